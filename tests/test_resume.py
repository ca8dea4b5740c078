"""Kill it anywhere and start it again: the weights are the same bits, every step is logged once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stagekit.errors import Interrupted, StageError
from stagekit.groups import EarlyStopping, LoRA, Reference
from stagekit.stage import TrainingStage
from tests.running import CrashError, crash_at, interrupt_at, lines, run, same, stage, weights


LORA = LoRA(rank=4, alpha=8, dropout=0.2)
Write = Callable[..., Path]


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any], preference_rows: list[Any]) -> dict[str, str]:
    return {"sft": str(write_rows(sft_rows, "sft.jsonl")), "dpo": str(write_rows(preference_rows, "dpo.jsonl"))}


def crash_then_resume(
    monkeypatch: pytest.MonkeyPatch, step: int, model: str, folder: Path, *stages: TrainingStage
) -> Any:
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(StageError, match="CrashError"):
            run(model, folder, *stages)
    return run(model, folder, *stages)


@pytest.mark.parametrize(
    ("method", "lora", "step"),
    [("sft", None, 5), ("sft", LORA, 5), ("dpo", None, 5), ("dpo", LORA, 5), ("sft", LORA, 2)],
    ids=["sft-full", "sft-lora", "dpo-full", "dpo-lora", "sft-lora-before-any-checkpoint"],
)
def test_a_killed_stage_ends_with_the_same_bits_and_the_same_log(
    method: str,
    lora: LoRA | None,
    step: int,
    data: dict[str, str],
    tiny_model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = stage("s", data[method], method, lora=lora if lora else ...)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    torch.manual_seed(step)  # what the process did before must not matter
    resumed = crash_then_resume(monkeypatch, step, tiny_model_path, tmp_path / "killed", only)

    assert same(str(whole.policy), str(resumed.policy))
    assert lines(tmp_path / "whole/01-s") == lines(tmp_path / "killed/01-s")
    assert [line["step"] for line in lines(tmp_path / "killed/01-s")] == [*range(1, 9), 8]
    assert resumed["s"].metrics["train_loss"] == whole["s"].metrics["train_loss"]


def test_log_lines_over_several_steps_survive_a_kill_in_their_middle(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = stage("s", data["dpo"], "dpo", logging_steps=5, max_steps=10)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    resumed = crash_then_resume(monkeypatch, 4, tiny_model_path, tmp_path / "killed", only)

    assert lines(tmp_path / "whole/01-s") == lines(tmp_path / "killed/01-s")
    assert resumed["s"].metrics["train_loss"] == whole["s"].metrics["train_loss"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_dpo_on_the_incoming_adapter_resumes_against_the_stage_input(
    dropout: float, data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoRA(rank=4, alpha=8, dropout=dropout)
    stages = (
        stage("sft", data["sft"], lora=lora, max_steps=3, learning_rate=1e-2),
        stage("dpo", data["dpo"], "dpo", lora=lora),
    )
    whole = run(tiny_model_path, tmp_path / "whole", *stages)
    seen = []
    from stagekit import training

    original = training.build

    def build(job: Any, *args: Any) -> Any:
        trainer, callbacks = original(job, *args)
        seen.append(trainer)
        return trainer, callbacks

    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path / "killed", *stages)
    monkeypatch.setattr(training, "build", build)
    reference: dict[str, torch.Tensor] = {}
    from stagekit.callbacks import Totals

    begin = Totals.on_train_begin

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        model = self.trainer.model
        reference.update({name: p.detach().clone() for name, p in model.named_parameters() if ".ref." in name})
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Totals, "on_train_begin", on_train_begin)
    resumed = run(tiny_model_path, tmp_path / "killed", *stages)

    assert same(str(whole.policy), str(resumed.policy))
    given = weights(str(resumed["sft"].policy))
    assert reference
    for name, tensor in reference.items():
        assert torch.equal(tensor, given[name.replace(".ref.", ".")]), name
    held = {id(parameter) for group in seen[-1].optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in seen[-1].model.named_parameters() if id(parameter) in held}
    assert names
    assert all(".default." in name for name in names)


def test_a_precomputed_reference_is_that_of_the_stage_input_after_a_resume(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit import training

    only = stage("s", data["dpo"], "dpo", reference=Reference(mode="precompute"), learning_rate=1e-2)
    columns: list[Any] = []
    original = training.build

    def build(job: Any, *args: Any) -> Any:
        trainer, callbacks = original(job, *args)
        columns.append(list(trainer.train_dataset["ref_chosen_logps"]))
        return trainer, callbacks

    monkeypatch.setattr(training, "build", build)
    crash_then_resume(monkeypatch, 5, tiny_model_path, tmp_path / "run", only)

    assert len(columns) == 2
    assert columns[0] == columns[1]


def test_a_torn_checkpoint_is_deleted_and_never_used(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = stage("s", data["sft"])
    whole = run(tiny_model_path, tmp_path / "whole", only)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path / "killed", only)
    checkpoints = tmp_path / "killed/01-s/checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-6/complete").unlink()  # killed while it was written
    shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-7")
    (checkpoints / "checkpoint-7/model.safetensors").unlink()  # killed while it was deleted
    (checkpoints / "checkpoint-8").mkdir()
    (checkpoints / "checkpoint-8/complete").write_text("")

    from stagekit.callbacks import last_checkpoint

    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert same(str(whole.policy), str(run(tiny_model_path, tmp_path / "killed", only).policy))


def test_a_crash_while_a_checkpoint_is_written_leaves_none(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit.callbacks import Totals

    def on_save(self: Any, *args: Any, **kwargs: Any) -> None:
        raise CrashError("while saving")

    monkeypatch.setattr(Totals, "on_save", on_save)
    with pytest.raises(StageError, match="while saving"):
        run(tiny_model_path, tmp_path / "run", stage("s", data["sft"]))

    assert not list((tmp_path / "run/01-s/checkpoints").glob("checkpoint-*"))


def test_a_line_of_metrics_that_a_crash_tore_is_cut_off(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = stage("s", data["sft"])
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path / "run", only)
    with (tmp_path / "run/01-s/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(tiny_model_path, tmp_path / "run", only)

    assert [line["step"] for line in lines(tmp_path / "run/01-s")] == [*range(1, 9), 8]


@pytest.mark.parametrize("options", [{"max_steps": 6}, {"max_steps": 8, "epochs": 2}], ids=["mid-epoch", "epoch-end"])
def test_a_kill_after_the_last_checkpoint_trains_no_further_step(
    options: dict[str, int],
    data: dict[str, str],
    tiny_model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stagekit import training

    only = stage("s", data["sft"], **options)
    whole = run(tiny_model_path, tmp_path / "whole", only)

    def save(*args: Any) -> None:
        raise CrashError("before the policy is saved")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", save)
        with pytest.raises(StageError, match="before the policy"):
            run(tiny_model_path, tmp_path / "killed", only)
    resumed = run(tiny_model_path, tmp_path / "killed", only)

    assert resumed["s"].steps == options["max_steps"]
    assert same(str(whole.policy), str(resumed.policy))
    assert resumed["s"].metrics["train_loss"] == whole["s"].metrics["train_loss"]
    assert lines(tmp_path / "whole/01-s") == lines(tmp_path / "killed/01-s")


def test_early_stopping_goes_on_counting_after_a_resume_and_has_stopped_once_it_stopped(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit import training

    only = stage(
        "s",
        data["sft"],
        validation_data=data["sft"],
        evaluation_steps=1,
        checkpoint_save_steps=1,
        learning_rate=1e-9,
        max_steps=12,
        early_stopping=EarlyStopping(patience=4, min_delta=0.5),
    )
    whole = run(tiny_model_path, tmp_path / "whole", only)
    assert whole["s"].steps == 5  # the first evaluation, and four without a gain
    assert whole["s"].status == "completed"

    resumed = crash_then_resume(monkeypatch, 3, tiny_model_path, tmp_path / "killed", only)
    assert resumed["s"].steps == 5
    assert same(str(whole.policy), str(resumed.policy))

    def save(*args: Any) -> None:
        raise CrashError("before the policy is saved")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", save)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path / "late", only)
    assert run(tiny_model_path, tmp_path / "late", only)["s"].steps == 5


@pytest.mark.parametrize("best", [False, True], ids=["by-steps", "only-best"])
def test_an_interrupt_leaves_a_checkpoint_of_its_step(
    best: bool, data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"validation_data": data["sft"], "evaluation_steps": 2, "early_stopping": None}
    if best:
        options |= {"save_only_best": True, "checkpoint_save_steps": ..., "learning_rate": 1e-2}
    only = stage("s", data["sft"], **options)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    for step in (4, 5):  # with an evaluation, and without
        folder = tmp_path / f"stopped-{step}"
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted):
                run(tiny_model_path, folder, only)
        result = json.loads((folder / "01-s/result.json").read_text())
        assert (result["status"], result["reason"]) == ("stopped", "interrupted")
        assert (folder / f"01-s/checkpoints/checkpoint-{step}/complete").is_file()
        assert same(str(whole.policy), str(run(tiny_model_path, folder, only).policy))
        assert lines(tmp_path / "whole/01-s") == lines(folder / "01-s")
