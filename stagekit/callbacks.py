"""What happens at the trainer's events: metrics on disk, progress, stopping, checkpoints by epoch, early stopping."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from stagekit.files import write_text
from stagekit.groups import EarlyStopping
from stagekit.show import Show
from stagekit.stopping import Stop


MARK = "complete"
"""A checkpoint folder holds this file once everything in it is written."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a crash left half-written is deleted, since the trainer would count it."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / MARK).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Marker(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole, after everything in it has reached the disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sync the files of the checkpoint, then write the mark."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        write_text(folder / MARK, "")


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Appends every log line to `metrics.jsonl`; a resume first cuts off the lines of steps that are done again."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if resumed_at and json.loads(line)["step"] <= resumed_at]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if logs and state.is_world_process_zero:
            record = {"step": state.global_step, **logs, "time": round(time.time(), 3)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


class Bar(TrainerCallback):  # type: ignore[misc]
    """Shows how far training is, with rate, time left and the last loss."""

    def __init__(self, show: Show, what: str) -> None:
        self._show, self._what, self._extra = show, what, ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at the step that training starts from."""
        self._progress = self._show.progress(self._what, state.max_steps, "step", "steps")
        self._progress.update(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the loss."""
        if logs and "loss" in logs:
            self._extra = f", loss {float(logs['loss']):.4f}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step further."""
        self._progress.update(state.global_step, self._extra)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the line of a training that was stopped."""
        if state.global_step < state.max_steps:
            self._progress.close()


class StopAndSave(TrainerCallback):  # type: ignore[misc]
    """Ends training at a checkpoint when the user asks, or when the stage's time is up. `reason` says which it was."""

    def __init__(self, stop: Stop, started: float, limit_seconds: float | None) -> None:
        self._stop, self._started, self._limit = stop, started, limit_seconds
        self.reason = ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the clock and at the user."""
        if state.global_step >= state.max_steps:
            return
        if self._stop():
            self.reason = "interrupted"
        elif self._limit is not None and time.monotonic() - self._started > self._limit:
            self.reason = "max_duration"
        if self.reason:
            control.should_save = True
            control.should_training_stop = True


class SaveByEpoch(TrainerCallback):  # type: ignore[misc]
    """A checkpoint every N epochs, beside those by steps, unless this step has one already."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint at the end of every Nth epoch."""
        done = round(state.epoch or 0)
        saved = (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK).is_file()
        if done and done % self._epochs == 0 and not saved:
            control.should_save = True


class StopEarly(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Ends training when a metric has not gained `min_delta` on its best value for `patience` evaluations.

    Not transformers' callback: that one is tied to the metric of the best checkpoint, and forgets its count on resume.
    """

    def __init__(self, options: EarlyStopping, best: float | None = None, waited: int = 0) -> None:
        self._options, self._best, self._waited = options, best, waited
        self.reason = ""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count an evaluation without a gain."""
        key = f"eval_{self._options.metric.removeprefix('eval_')}"
        if metrics is None or key not in metrics:
            have = ", ".join(sorted(name for name in metrics or {} if name.startswith("eval_")))
            raise KeyError(f"early_stopping.metric: no metric {key!r} was measured; there are: {have}")
        value = metrics[key] if self._options.maximize else -metrics[key]
        if self._best is None or value > self._best + self._options.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        if math.isnan(value) or self._waited >= self._options.patience:
            self.reason = "early_stopping"
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"best": self._best, "waited": self._waited}, "attributes": {}}
