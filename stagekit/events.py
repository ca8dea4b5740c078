"""The user's functions at a stage's events: called with what the specification gives them, named where they fail."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from stagekit import ranks
from stagekit.callbacks import exported
from stagekit.custom import call_back
from stagekit.groups import Callbacks


class Events(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Calls `on_batch_complete` after every optimiser step and `on_epoch_complete` after every whole epoch.

    The sum behind an epoch's mean loss is kept in checkpoints, so that a resumed epoch has the same mean.
    """

    def __init__(self, functions: Callbacks, resume: Path | None = None) -> None:
        """Call `functions`; go on with the sums that the checkpoint `resume` holds."""
        self._functions = functions
        before = {} if resume is None else exported(resume, type(self).__name__)
        self._sum: Any = before.get("sum", 0.0)
        self._count: int = before.get("count", 0)
        self._step: list[Any] = []

    def sees(self, loss: Any) -> None:
        """Take a batch's share in the loss of its step; no number is read from an accelerator here."""
        self._step.append(loss)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint at the very end of an epoch is gone on from with the next one."""
        if _whole(state.epoch):
            self._sum, self._count = 0.0, 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the function of the user, with a number."""
        loss = ranks.mean(float(sum(self._step))) if args.world_size > 1 else sum(self._step)
        self._step = []
        self._sum, self._count = self._sum + loss, self._count + 1
        if state.is_world_process_zero and self._functions.on_batch_complete is not None:
            call_back(self._functions, "on_batch_complete", state.global_step, float(loss))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the function of the user, unless training stopped in the middle of the epoch."""
        epochs = _whole(state.epoch)
        if not epochs or not self._count:
            return
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        if state.is_world_process_zero:
            call_back(self._functions, "on_epoch_complete", epochs, float(mean))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"sum": float(self._sum), "count": self._count}, "attributes": {}}


def _whole(epoch: float | None) -> int:
    """The number of epochs that are over; 0 in the middle of one."""
    number = round(epoch or 0.0)
    return number if math.isclose(epoch or 0.0, number, abs_tol=1e-6) else 0
