"""Stages of two processes that sample, as a user starts them: what each draws, signals, deaths, failures of one."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import TrainingPipeline
from stagekit.plan import plan
from tests.launched import torchrun
from tests.running import account, lines, pipeline, same, stage
from tests.test_isolation import Parent, _alive, finish, steps
from tests.test_launches import ranks_of
from tests.test_sampling_distributed import written


pytestmark = pytest.mark.slow


def split(folder: Path, model: str, method: dict[str, Any]) -> Path:
    """A file with one stage of two processes; a rollout is four steps."""
    given = {"rollout_samples": 8, "epochs_per_batch": 2, **method}
    made = stage(
        "s", written(folder.parent)["prompts"], given, distributed_strategy="ddp", batch_size=2, max_steps=14,
        generation={"max_new_tokens": 6}, callbacks={"on_batch_complete": "tests.sampled:pause"},
    )  # fmt: skip
    file = folder.with_suffix(".yaml")
    declared = {"name": "r", "model": model, "output_dir": str(folder), "stages": [made.only_set()]}
    file.write_text(yaml.safe_dump(declared))
    return file


def test_signals_and_deaths_inside_a_rollout_end_in_the_same_bits(tiny_model_path: str, tmp_path: Path) -> None:
    """Ctrl-C; then one of the two is killed; then it ends. The value model and both shares of the rollout with it."""
    method = {"type": "ppo", "reward": "tests.sampled:letters"}
    whole = split(tmp_path / "whole", tiny_model_path, method)
    finish(whole, tmp_path / "whole")
    folder = tmp_path / "run"
    file = split(folder, tiny_model_path, method)

    parent = Parent(file, folder)
    parent.until(lambda: steps(folder) >= 1)
    parent.process.send_signal(signal.SIGINT)
    code, out = parent.end()
    assert code == 130, out
    assert account(folder / "01-s")["reason"] == "interrupted"
    (checkpoint,) = {path.parent for path in folder.glob("01-s/checkpoints/*/complete")}
    stopped_at = int(checkpoint.name[11:])
    assert stopped_at < 14
    shares = sorted(path.name for path in checkpoint.glob("rollout-*.safetensors"))
    assert shares == (["rollout-0.safetensors", "rollout-1.safetensors"] if stopped_at % 4 else [])

    parent = Parent(file, folder)
    parent.until(lambda: steps(folder) >= 7 and (folder / "01-s/checkpoints/checkpoint-6/complete").exists())
    both = ranks_of(parent)
    os.kill(both[1], signal.SIGKILL)
    code, out = parent.end()
    assert code == 1, out
    assert "one of its 2 processes was killed (signal 9)" in out
    assert not _alive(both[0])
    shares = sorted(path.name for path in (folder / "01-s/checkpoints/checkpoint-6").glob("rollout-*.safetensors"))
    assert shares == ["rollout-0.safetensors", "rollout-1.safetensors"]

    finish(file, folder)
    assert same(folder / "01-s/policy", tmp_path / "whole/01-s/policy")
    assert lines(folder / "01-s") == lines(tmp_path / "whole/01-s")


METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"type": "grpo", "group_size": 8, "kl_penalty_coefficient": 0.05},
    "rloo": {"type": "rloo", "group_size": 2},
    "online_dpo": {"type": "online_dpo"},
}


def three(model: str, folder: Path) -> TrainingPipeline:
    rows = written(folder.parent)["prompts"]
    stages = [
        stage(
            kind, rows, {**method, "rollout_samples": 8, "epochs_per_batch": 2, "reward": "tests.sampled:noted"},
            model=model, batch_size=2, distributed_strategy="ddp", generation={"max_new_tokens": 6},
            max_steps=8 if kind != "rloo" else ..., epochs=1, max_training_samples=8,
        )
        for kind, method in METHODS.items()
    ]  # fmt: skip
    return pipeline(model, folder, *stages)


def test_every_type_goes_on_inside_a_rollout_with_the_same_bits(tiny_model_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torchrun(tmp_path, three(tiny_model_path, folder), NOTES=str(tmp_path / "whole"))
    shutil.copytree(folder, tmp_path / "whole")
    for kind in sorted(folder.glob("0*")):  # as a crash after the first checkpoint leaves it
        assert len(list((kind / "checkpoints/checkpoint-3").glob("rollout-?.safetensors"))) == 2
        shutil.rmtree(kind / "policy")
        for checkpoint in kind.glob("checkpoints/checkpoint-*"):
            if checkpoint.name != "checkpoint-3":
                shutil.rmtree(checkpoint)
        (kind / "result.json").unlink()
    torchrun(tmp_path, three(tiny_model_path, folder), NOTES=str(tmp_path / "again"))
    for kind in sorted(folder.glob("0*")):
        assert same(kind / "policy", tmp_path / "whole" / kind.name / "policy")
        assert lines(kind) == lines(tmp_path / "whole" / kind.name)
    first, second = (notes(tmp_path, "whole", rank) for rank in (0, 1))
    assert set(first[0]["prompts"]) == set(second[0]["prompts"])  # one group on both
    for ours, theirs in zip(first, second, strict=True):
        assert ours["completions"] != theirs["completions"], "the processes draw different completions"
    assert len(first) - len(notes(tmp_path, "again", 0)) == 3  # the first rollout of each stage was not drawn anew
    planned = [entry["steps"] for entry in plan(three(tiny_model_path, folder), processes=2)]
    assert planned == [account(kind)["steps"] for kind in sorted(folder.glob("0*"))] == [8, 8, 8]


def notes(folder: Path, name: str, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, f"{name}-{rank}.jsonl").read_text().splitlines()]


def test_a_reward_that_raises_on_one_process_stops_all_with_its_prompt(tiny_model_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    method = {"type": "grpo", "reward": "tests.sampled:fails_on_the_second", "group_size": 2}
    parent = Parent(split(folder, tiny_model_path, method), folder)
    code, out = parent.end()
    assert code == 1, out
    told = (
        "stage 's': reward 'fails_on_the_second' raised ValueError: nothing to say on the second process\n  prompt: "
    )
    assert told in out
    assert "\n  completion: " in out
    assert account(folder / "01-s")["reason"].startswith(told)
