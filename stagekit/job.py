"""What a stage works with, and what it hands back."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagekit.adapters.base import Setting
from stagekit.result import StageResult
from stagekit.show import Show
from stagekit.stopping import Stop


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


@dataclass(frozen=True)
class ModelInput:
    """The model that a stage starts from. `base` is what TRL is given by name; `adapter` is a folder to go on training
    (None: there is none, or it was merged into `base`); `generates` is the folder or id that generation loads."""

    base: str
    adapter: str | None = None

    @property
    def generates(self) -> str:
        """The whole model, adapter included."""
        return self.adapter if self.adapter is not None else self.base


@dataclass(frozen=True)
class Job:
    """One stage with everything resolved: arguments, model, tokenizer, datasets, and the folder it writes to."""

    stage: "TrainingStage"
    settings: tuple[Setting, ...]
    folder: Path
    results: Mapping[str, StageResult]
    previous: StageResult | None
    model: ModelInput | None
    tokenizer: Any
    train_dataset: Any
    eval_dataset: Any
    stop: Stop
    show: Show
    chat_template: str | None = None
    datasets: Mapping[str, Path] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> Path:
        """Where the trainer's checkpoints stand."""
        return self.folder / "checkpoints"

    def setting(self, target: str, default: Any = None) -> Any:
        """The value of one TRL argument."""
        return next((setting.value for setting in self.settings if setting.target == target), default)


@dataclass(frozen=True)
class Outcome:
    """What a stage type's work came to; the runner makes the StageResult of it."""

    artifacts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    samples_trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    stopped: str = ""
    """Why the stage ended before its time (`max_duration`); empty where it did not."""


@dataclass(frozen=True)
class CustomContext:
    """What the function of a custom stage is called with."""

    model: str | None
    """The incoming model: a folder or a hub id; None where the pipeline has none yet."""
    train_dataset: Any
    eval_dataset: Any
    output_dir: Path
    seed: int
    metadata: Mapping[str, Any]
    results: Mapping[str, StageResult]
    stop: Stop
