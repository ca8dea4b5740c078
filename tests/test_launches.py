"""Stages of two processes, started as a user starts them: signals, deaths, failures of one, and every type."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import TrainingStage
from stagekit.errors import RunLocked
from stagekit.files import lock
from tests.launched import torchrun
from tests.running import account, lines, losses, pipeline, run, same, stage
from tests.test_isolation import ROOT, Parent, _alive, finish, steps


pytestmark = pytest.mark.slow
Write = Callable[..., Path]
CLOSE = 1e-5
"""What the order of a sum in float32 explains; see `test_distributed.py`."""


def ranks_of(parent: Parent) -> list[int]:
    """The processes that the launcher of a stage has started."""
    launcher = parent.child()
    return [int(one) for one in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def split(folder: Path, write_rows: Write, rows: list[Any], model: str, **options: Any) -> Path:
    """A file with one stage of two processes that takes its time."""
    data = str(write_rows(rows))
    slow = {
        "evaluation_steps": 1, "validation_data": data, "early_stopping": None, "max_steps": 20,
        "checkpoint_save_epochs": 0, "custom_evaluation_function": "tests.isolated:slow", "batch_size": 2,
    }  # fmt: skip
    declared = stage("s", data, **{**slow, "distributed_strategy": "ddp", **options}).only_set()
    declared = {key: value for key, value in declared.items() if value is not ...}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"name": "r", "model": model, "output_dir": str(folder), "stages": [declared]}))
    return file


def test_signals_and_deaths_of_split_stages_end_in_the_same_bits(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    """Ctrl-C; then one of the two is killed; then the parent is killed and both stop by themselves; then it ends."""
    whole = split(tmp_path / "whole", write_rows, sft_rows, tiny_model_path)
    finish(whole, tmp_path / "whole")
    folder = tmp_path / "run"
    file = split(folder, write_rows, sft_rows, tiny_model_path)

    parent = Parent(file, folder)  # Ctrl-C
    parent.until(lambda: steps(folder) >= 2)
    both = ranks_of(parent)
    assert len(both) == 2
    parent.process.send_signal(signal.SIGINT)
    code, out = parent.end()
    assert code == 130, out
    assert not any(_alive(one) for one in both)
    assert (account(folder / "01-s")["status"], account(folder / "01-s")["reason"]) == ("stopped", "interrupted")
    stopped_at = max(int(path.parent.name[11:]) for path in folder.glob("01-s/checkpoints/*/complete"))
    assert stopped_at == steps(folder) < 20

    parent = Parent(file, folder)  # one of the two is killed
    parent.until(lambda: steps(folder) >= stopped_at + 4)
    both = ranks_of(parent)
    os.kill(both[1], signal.SIGKILL)
    code, out = parent.end()
    assert code == 1, out
    assert "StageError: stage 's': one of its 2 processes was killed (signal 9), which is what the system" in out
    assert out.count("\n") < 20, "one clear error"
    assert not _alive(both[0])
    assert account(folder / "01-s")["status"] == "failed"

    before = steps(folder)
    parent = Parent(file, folder)  # the parent is killed
    parent.until(lambda: steps(folder) >= before + 1)
    all_of_it = [parent.child(), *ranks_of(parent)]
    parent.process.send_signal(signal.SIGKILL)
    parent.process.wait()
    with pytest.raises(RunLocked), lock(folder):
        pass
    parent.until(lambda: not any(_alive(one) for one in all_of_it), 60)
    assert account(folder / "01-s")["reason"] == "interrupted"
    assert steps(folder) < 20

    finish(file, folder)
    assert same(folder / "01-s/policy", tmp_path / "whole/01-s/policy")
    assert lines(folder / "01-s") == lines(tmp_path / "whole/01-s")


def is_free(folder: Path) -> bool:
    try:
        with lock(folder):
            return True
    except RunLocked:
        return False


def test_the_launcher_s_death_leaves_no_process_and_no_lock(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    parent = Parent(split(folder, write_rows, sft_rows, tiny_model_path), folder)
    parent.until(lambda: steps(folder) >= 1)
    both = ranks_of(parent)
    os.kill(parent.child(), signal.SIGKILL)
    code, out = parent.end()
    assert code == 1, out
    assert "was killed (signal 9)" in out
    parent.until(lambda: not any(_alive(one) for one in both), 60)
    parent.until(lambda: is_free(folder), 10)  # a dead process's other threads can still be closing its files


def test_a_failure_of_one_process_is_told_with_its_reason(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = {"custom_loss_function": "tests.launched:fails_on_the_second", "validation_data": ..., "max_steps": 4}
    options |= dict.fromkeys(("evaluation_steps", "early_stopping", "custom_evaluation_function"), ...)
    parent = Parent(split(folder, write_rows, sft_rows, tiny_model_path, **options), folder)
    code, out = parent.end()
    assert code == 1, out
    assert "StageError: stage 's': ValueError: no loss on the second process" in out
    assert account(folder / "01-s")["reason"] == "stage 's': ValueError: no loss on the second process"
    assert "fails_on_the_second" in (folder / "01-s/error.txt").read_text()


def test_rows_that_differ_from_process_to_process_are_no_rows_to_share_out(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage(
        "s", str(write_rows(sft_rows)), data_preprocessor="tests.launched:other_rows", distributed_strategy="ddp"
    )
    out = torchrun(tmp_path, pipeline(tiny_model_path, tmp_path / "run", only), code=1)
    told = [line for line in out.splitlines() if "rows differ from process to process; a data_preprocessor" in line]
    assert {line[1:13] for line in told} == {" StageError:"}


def test_what_is_wrong_before_a_stage_is_told_by_every_process(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage("s", str(write_rows(sft_rows)), distributed_strategy="ddp")
    folder = tmp_path / "run"
    folder.mkdir()
    with lock(folder):
        pass  # a lock file that nobody holds is no obstacle
    (folder / "01-s").write_text("no folder")
    out = torchrun(tmp_path, pipeline(tiny_model_path, folder, only), code=1)
    assert {line[1:13] for line in out.splitlines()} == {" StageError:"}


def test_a_time_limit_ends_all_processes_at_one_checkpoint(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T54: a process that stops by its own clock leaves the others waiting for it."""
    folder = tmp_path / "run"
    finish(split(folder, write_rows, sft_rows, tiny_model_path, max_duration="1s"), folder)
    found = account(folder / "01-s")
    assert (found["status"], found["reason"], found["steps"]) == ("stopped", "max_duration", 1)
    assert (folder / "01-s/checkpoints/checkpoint-1/rng_state_1.pth").is_file()


def test_the_command_line_starts_the_processes_and_speaks_once(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    rows = str(write_rows(sft_rows))
    plain = {"max_steps": 2, "batch_size": 2, "warmup_ratio": 0.0}
    stages = [
        {"name": "s", "method": "sft", "training_data": rows, **plain, "distributed_strategy": "ddp"},
        {"name": "e", "method": "evaluation", "validation_data": rows},
    ]
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump({"model": tiny_model_path, "output_dir": str(folder), "stages": stages}))
    command = [sys.executable, "-m", "stagekit", "run", str(file), "--num-processes", "3"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("training 2/2 steps") == 1
    assert [account(folder / name)["processes"] for name in ("01-s", "02-e")] == [3, 1]
    assert json.loads((folder / "lock.json").read_text())["processes"] == {"s": 3, "e": 1}


def test_every_type_that_carries_ddp_trains_under_it(
    write_rows: Write, preference_rows: list[Any], sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    """The same losses too, where the loss of a batch is a mean over its rows. KTO's divergence is estimated within the
    batch of a process, ORPO's and CPO's likelihood is a mean over the tokens of one."""
    steps_of = [
        {"prompt": row["prompt"], "completions": ["Well.", "So."], "labels": [number % 2 == 0, True]}
        for number, row in enumerate(sft_rows)
    ]
    pairs, labelled = str(write_rows(preference_rows, "pairs.jsonl")), str(write_rows(steps_of, "steps.jsonl"))
    exact = {"simpo", "reward", "process_reward"}
    kinds = sorted({"kto", "orpo", "cpo", *exact})

    def stages(batch: int, **options: Any) -> list[TrainingStage]:
        made = []
        for kind in kinds:
            data = labelled if kind == "process_reward" else pairs
            more = {"model": tiny_model_path, "validation_data": data, "evaluation_steps": 2}
            made.append(stage(kind, data, kind, **{**more, **options, "batch_size": batch, "max_steps": 4}))
        return made

    torchrun(tmp_path, pipeline(tiny_model_path, tmp_path / "two", *stages(4, distributed_strategy="ddp")))
    run(tiny_model_path, tmp_path / "one", *stages(8))
    for number, kind in enumerate(kinds, 1):
        two, one = (tmp_path / where / f"{number:02d}-{kind}" for where in ("two", "one"))
        assert account(two)["processes"] == 2
        assert account(two)["samples_trained"] == account(one)["samples_trained"]
        tolerance = CLOSE if kind in exact else 0.1
        assert losses(two) == pytest.approx(losses(one), abs=tolerance, rel=tolerance)
        if kind in exact:
            ours, theirs = (account(folder)["metrics"]["eval_loss"] for folder in (two, one))
            assert ours == pytest.approx(theirs, abs=CLOSE)


def test_the_best_checkpoint_and_early_stopping_are_decided_together(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    rows = str(write_rows(sft_rows))
    options: dict[str, Any] = {
        "validation_data": rows, "evaluation_steps": 1, "save_only_best": True, "checkpoint_save_steps": ...,
        "early_stopping": {"patience": 1, "min_delta": 5.0}, "max_steps": 6,
    }  # fmt: skip
    only = stage("s", rows, **{**options, "batch_size": 4, "distributed_strategy": "ddp"})
    torchrun(tmp_path, pipeline(tiny_model_path, tmp_path / "two", only))
    run(tiny_model_path, tmp_path / "one", stage("s", rows, **{**options, "batch_size": 8}))
    two, one = (tmp_path / where / "01-s" for where in ("two", "one"))
    assert account(two)["steps"] == account(one)["steps"] < 6
    names = [sorted(path.name for path in folder.glob("checkpoints/checkpoint-*")) for folder in (two, one)]
    assert names[0] == names[1]
    assert len(names[0]) == 1
