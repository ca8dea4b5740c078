"""Help for tests that run pipelines: short declarations, weights of a result, a crash at a given step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagekit.pipeline import TrainingPipeline
from stagekit.result import PipelineResult
from stagekit.stage import TrainingStage


class CrashError(Exception):
    """What a test throws into a run."""


def stage(name: str, data: Any, method: Any = "sft", **options: Any) -> TrainingStage:
    """A stage of 8 steps at 4 rows, deterministic, with a log line per step."""
    given = {
        "batch_size": 4,
        "max_steps": 8,
        "logging_steps": 1,
        "checkpoint_save_steps": 3,
        "learning_rate": 1e-3,
        "use_deterministic_algorithms": True,
        **options,
    }
    given = {key: value for key, value in given.items() if value is not ...}
    return TrainingStage(name=name, method=method, training_data=data, **given)


def pipeline(model: Any, folder: Path, *stages: TrainingStage, **options: Any) -> TrainingPipeline:
    return TrainingPipeline(name="test", model=model, output_dir=folder, stages=stages, **options)


def run(model: Any, folder: Path, *stages: TrainingStage, **options: Any) -> PipelineResult:
    return pipeline(model, folder, *stages).run(quiet=True, **options)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    assert found, f"no weights in {folder}"
    return found


def same(one: str | Path, other: str | Path) -> bool:
    """Whether the weights in two folders are the same bits."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def lines(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` of a stage's folder, without what depends on the clock."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    timed = ("time", "runtime", "per_second", "flos")
    return [
        {key: value for key, value in json.loads(line).items() if not any(word in key for word in timed)}
        for line in text.splitlines()
    ]


def losses(folder: Path) -> list[float]:
    """The loss of every log line of a stage's folder."""
    return [line["loss"] for line in lines(folder) if "loss" in line]


def account(folder: Path) -> dict[str, Any]:
    """`result.json` of a stage's folder."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training die at the end of a step, before anything is saved there."""
    from stagekit.callbacks import Bar

    original = Bar.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise CrashError(f"at step {step}")
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Bar, "on_step_end", on_step_end)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the user ask to stop at the end of a step."""
    from stagekit.callbacks import StopAndSave

    original = StopAndSave.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            self._stop.ask()
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopAndSave, "on_step_end", on_step_end)
