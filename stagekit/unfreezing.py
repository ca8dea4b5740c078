"""Gradual unfreezing: one more group of layers every few epochs, from the top.

The optimiser has to know all of them from the start, since one that is made while a layer is frozen never trains it.
So `GradualUnfreezing.before_optimizer` lets everything be trained, `create_optimizer` takes it all, and the callback
freezes it when training begins. A frozen weight has no gradient, and an optimiser leaves such a weight alone, without
decay either.
"""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stagekit.errors import ConfigError, Problem, StageError
from stagekit.freezing import groups_of


class GradualUnfreezing(TrainerCallback):  # type: ignore[misc]
    """Trains the first group at once and one more after every `interval` epochs.

    What is open follows from `state.epoch` alone, so that a resumed run goes on as it would have.
    Source: huggingface.co/papers/1801.06146, section 3.3.
    """

    def __init__(self, model: Any, interval: int = 1, where: str = "") -> None:
        """Group what is trained now; make it after `freeze`, before the optimiser.

        Raises:
            ConfigError: there is one group only.
        """
        self._groups, self._interval, self._open = groups_of(model), interval, 0
        if len(self._groups) < 2:
            message = "only one group of layers is trained, so there is none to unfreeze later"
            raise ConfigError([Problem(f"{where}.use_gradual_unfreezing".lstrip("."), message)])
        self._depths = {id(one): depth for depth, group in enumerate(self._groups) for one in group}
        for group in self._groups:
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(self._drop)
        self.before_optimizer()

    @property
    def groups(self) -> int:
        """How many groups there are; all are open after this many times the interval, less one."""
        return len(self._groups)

    def before_optimizer(self) -> None:
        """Let all groups be trained, so that the optimiser takes them."""
        self._set(len(self._groups))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze what is not open yet.

        Raises:
            StageError: the optimiser was made without some of it.
        """
        known = {id(one) for group in kwargs["optimizer"].param_groups for one in group["params"]}
        missing = len(self._depths.keys() - known)
        if missing:
            raise StageError(f"gradual unfreezing: the optimiser lacks {missing} tensors that are unfrozen later")
        self.on_epoch_begin(args, state, control)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the groups of this epoch."""
        self._set(1 + math.floor(state.epoch or 0) // self._interval)

    def _set(self, count: int) -> None:
        self._open = count
        for depth, group in enumerate(self._groups):
            for parameter in group:
                parameter.requires_grad_(depth < count)

    def _drop(self, parameter: Any) -> None:
        """Drop the gradient of a frozen adapter: peft unfreezes all of them when a reference switches them off."""
        if self._depths[id(parameter)] >= self._open:
            parameter.grad = None
