"""What happens at the trainer's events: metrics on disk, progress, stopping, checkpoints by epoch, early stopping."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from stagekit import ranks
from stagekit.errors import Interrupted, StageError
from stagekit.files import sync_files, write_text
from stagekit.groups import EarlyStopping
from stagekit.hooks import Tracked
from stagekit.result import OUT_OF_TIME
from stagekit.show import Show
from stagekit.stopping import Stop


MARK = "complete"
"""A checkpoint folder holds this file, with the size of every other one, once all of them are on disk."""

TOTALS = "totals.json"
"""What a checkpoint of transformers leaves out: the sums behind the next log line, and whether training had ended."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a crash left half-written or half-deleted is deleted, never used."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def ended(checkpoint: Path, limit_seconds: float | None) -> str | None:
    """Why training had ended when the checkpoint was written: `completed`, or a reason; None: there is more to do.

    Args:
        limit_seconds: The time that the stage has now. A training that ran out of a shorter one is not over.
    """
    totals = json.loads((checkpoint / TOTALS).read_text(encoding="utf-8"))
    found, had = totals["ended"], totals.get("limit")
    if found == OUT_OF_TIME and had is not None and (limit_seconds is None or limit_seconds > had):
        return None
    return None if found is None else str(found)


class Totals(TrainerCallback):  # type: ignore[misc]
    """Keeps the sums of the log line under way in each checkpoint, so that a resumed run logs the same numbers."""

    def __init__(
        self, resume: Path | None, ended: Callable[[], str | None], limit_seconds: float | None = None
    ) -> None:
        """Go on from `resume`; `ended` says why training stops, or None where it is to go on later."""
        self._resume, self._ended, self._limit = resume, ended, limit_seconds
        self.trainer: Any = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the sums into the checkpoint."""
        trainer = self.trainer
        trainer._tr_loss.fill_(ranks.mean(float(trainer._tr_loss)))  # of all processes, as the next log line has it
        totals = {
            "window": float(trainer._tr_loss),
            "before": trainer._total_loss_scalar,
            "logged_at": trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"] if hasattr(trainer, "_metrics") else {},
            "tokens": getattr(trainer, "_total_train_tokens", 0),
            "ended": self._ended() if control.should_training_stop else None,
            "limit": self._limit,
        }
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            write_text(folder / TOTALS, json.dumps(totals, default=float) + "\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the sums up again."""
        if self._resume is None:
            return
        totals, trainer = json.loads((self._resume / TOTALS).read_text(encoding="utf-8")), self.trainer
        trainer._tr_loss.fill_(totals["window"])
        trainer._total_loss_scalar = totals["before"]
        trainer._globalstep_last_logged = totals["logged_at"]
        if hasattr(trainer, "_metrics"):  # TRL's trainers; one of transformers logs neither
            trainer._metrics["train"].update(totals["metrics"])
            trainer._total_train_tokens = totals["tokens"]


class Marker(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole, after everything in it has reached the disk; then leaves, if that was asked."""

    def __init__(self, leave: Callable[[], bool] | None = None) -> None:
        self._leave = leave

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sync the files of the checkpoint, then write the mark.

        Raises:
            Interrupted: the user asked to stop. Here, since a trainer that ends by itself deletes and loads
                checkpoints as if it were done.
        """
        ranks.wait()  # each process leaves its random state there
        ranks.once(lambda: _mark(Path(args.output_dir) / f"checkpoint-{state.global_step}"))
        if self._leave is not None and self._leave():
            raise Interrupted(f"stopped at step {state.global_step}")


def _mark(folder: Path) -> None:
    (folder / MARK).unlink(missing_ok=True)
    write_text(folder / MARK, json.dumps(sync_files(folder)) + "\n")


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Appends every log line to `metrics.jsonl`; a resume first cuts off the lines of steps that are done again, a
    line that a crash tore, and the summary of a training that was not the last."""

    def __init__(self, path: Path, resumed_at: int, over: bool, tracked: Tracked) -> None:
        self._path, self._tracked = path, tracked
        kept = [line for line, record in _records(path) if _stands(record, resumed_at, over)]
        if ranks.rank() == 0:
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
            shown = {key: value for key, value in logs.items() if not self._tracked.hides(key)}
            record = {"step": state.global_step, **shown, "time": round(time.time(), 3)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            return
        yield line, record


def _stands(record: Mapping[str, Any], resumed_at: int, over: bool) -> bool:
    return 0 < record["step"] <= resumed_at and (over or "train_runtime" not in record)


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


_REASONS = ("", OUT_OF_TIME, "interrupted")
"""Why a stage stops, the stronger reason last."""


class StopAndSave(TrainerCallback):  # type: ignore[misc]
    """Ends training at a checkpoint when the user asks, or when the stage's time is up. `reason` says which it was."""

    def __init__(self, stop: Stop, started: float, limit_seconds: float | None) -> None:
        self._stop, self._started, self._limit = stop, started, limit_seconds
        self.reason = ""

    def leaves(self) -> bool:
        """Whether the user asked to stop, so that the trainer is left at the next checkpoint."""
        return self.reason == "interrupted"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the clock and at the user. One process that stops stops all, at the same step."""
        if state.global_step >= state.max_steps:
            return
        over = self._limit is not None and time.monotonic() - self._started > self._limit
        self.reason = _REASONS[ranks.largest(2 if self._stop() else int(over))]
        if self.reason:
            control.should_save = True
            control.should_training_stop = True


class Wrapped(TrainerCallback):  # type: ignore[misc]
    """Sees that the work is split as declared: accelerate can fall back to another strategy without a word."""

    def __init__(self, strategy: str) -> None:
        self._strategy = strategy
        self.trainer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the wrapped model.

        Raises:
            StageError: it is wrapped in something else, or there is only one process.
        """
        model, processes = self.trainer.model_wrapped, self.trainer.accelerator.num_processes
        if not isinstance(model, DistributedDataParallel) or processes < 2:
            raise StageError(
                f"distributed_strategy: {self._strategy!r} was asked for, but the model is a {type(model).__name__} "
                f"in {processes} process{'es' if processes > 1 else ''}; this version of accelerate does not do what "
                "stagekit expects"
            )


class SaveByEpoch(TrainerCallback):  # type: ignore[misc]
    """A checkpoint every N epochs, beside those by steps, unless this step has one already."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint at the end of every Nth epoch."""
        epoch = state.epoch or 0.0
        done = round(epoch) if math.isclose(epoch, round(epoch), abs_tol=1e-6) else 0  # 0: stopped in its middle
        saved = (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK).is_file()
        if done and done % self._epochs == 0 and not saved:
            control.should_save = True


class StopEarly(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Ends training when a metric has not gained `min_delta` on its best value for `patience` evaluations.

    Not transformers' callback: that one is tied to the metric of the best checkpoint, and forgets its count on resume.
    """

    def __init__(self, options: EarlyStopping, key: str, resume: Path | None = None) -> None:
        """Watch `key`, the trainer's name of the metric; with the count that the checkpoint `resume` holds."""
        self._options, self._key = options, key
        before = {} if resume is None else exported(resume, type(self).__name__)
        self._best: float | None = before.get("best")
        self._waited: int = before.get("waited", 0)
        self.reason = ""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count an evaluation without a gain.

        Raises:
            StageError: the metric was not measured.
        """
        if metrics is None or self._key not in metrics:
            have = ", ".join(sorted(name for name in metrics or {} if name.startswith("eval_")))
            raise StageError(f"early_stopping.metric: no metric {self._key!r} was measured; there are: {have}")
        value = metrics[self._key] if self._options.maximize else -metrics[self._key]
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


def exported(checkpoint: Path, name: str) -> dict[str, Any]:
    """What the callback `name` left in a checkpoint."""
    states = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["stateful_callbacks"]
    found: dict[str, Any] = states.get(name, {}).get("args", {})
    return found
