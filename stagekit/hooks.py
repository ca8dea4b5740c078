"""What stagekit adds to a TRL trainer: one mixin, which adds nothing where no hook is set."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stagekit import ranks
from stagekit.distributed import live_processes
from stagekit.errors import StageError
from stagekit.own_loss import Loss, own_loss
from stagekit.schedules import make_scheduler
from stagekit.text_metrics import TextEvaluation


@dataclass(frozen=True)
class Tracked:
    """Which metrics of an evaluation are kept. What is not is measured all the same: early stopping and the best
    checkpoint see it."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """The trainer's key -> its name in `metrics_to_track` (eval_loss -> loss)."""
    names: frozenset[str] = frozenset()
    """`metrics_to_track`."""
    all_own: bool = True
    """Whether every number of the user's own function is kept; False where the user listed which."""
    own: set[str] = field(default_factory=set)
    """Keys that the user's own function returned."""

    def listed(self, key: str) -> bool:
        """Whether the user wants this number of an evaluation in the result."""
        if key in self.own:
            return self.all_own or key.removeprefix("eval_") in self.names
        return self.keys.get(key) in self.names

    def hides(self, key: str) -> bool:
        """Whether `metrics_to_track` leaves this number out of the log."""
        return (key in self.keys or key in self.own) and not self.listed(key)

    def missing(self) -> list[str]:
        """Names that the user asked for and no evaluation gives; known once the own function was called."""
        found = {*self.keys.values(), *(key.removeprefix("eval_") for key in self.own)}
        return sorted(self.names - found)


@dataclass(frozen=True)
class Hooks:
    """What to add: log keys to leave out, metrics to derive from an evaluation, tags of the model card."""

    hidden_logs: frozenset[str] = frozenset()
    perplexity: bool = False
    evaluate: Callable[[Any, Any], Mapping[str, float]] | None = None
    texts: TextEvaluation | None = None
    """What measures the answers of the model as it is; None: no metric of texts is asked for."""
    tags: tuple[str, ...] = ()
    tracked: Tracked = field(default_factory=Tracked)
    schedule: Callable[[int, int, float], Callable[[int], float]] | None = None
    """(warm-up steps, steps, steps per epoch) -> the schedule as a function of the step; None: TRL's own."""
    before_optimizer: Callable[[], None] | None = None
    """Called right before the optimiser is made: what it must hold is decided here."""
    loss: Loss | None = None
    """The user's own loss; None: TRL's."""
    sees_loss: Callable[[Any], None] | None = None
    """Called with the share that each batch has in the loss of its optimiser step, as it stands on its device."""
    loss_scale: float | None = None
    """The first scale of fp16; None: torch's own."""
    must_save: Callable[[], bool] | None = None
    """Whether the trainer is stopping and has to leave a checkpoint, the best or not."""


class Hooked:
    """Mixin for TRL trainers; set `hooks` before anything is trained."""

    hooks = Hooks()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Leave out what the stage does not want logged; the mean loss is that of all steps, also after a resume."""
        trainer: Any = self
        if "train_loss" in logs and trainer.state.global_step:
            logs["train_loss"] = trainer._total_loss_scalar / trainer.state.global_step
        for key in self.hooks.hidden_logs:
            logs.pop(key, None)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Add perplexity, metrics of texts and the user's own, where early stopping and best checkpoints see them."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = output.metrics.get(f"{prefix}_loss")
        if self.hooks.perplexity and loss is not None:
            output.metrics[f"{prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if self.hooks.texts is not None:
            trainer: Any = self
            measured = self.hooks.texts(trainer.accelerator.unwrap_model(trainer.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in measured.items()})
        if self.hooks.evaluate is not None:
            found = ranks.once(lambda: self._own_metrics(prefix))
            _refuse_twice(self.hooks.texts, found, prefix)
            output.metrics.update(found)
            self.hooks.tracked.own.update(found)
            missing = self.hooks.tracked.missing()
            if missing:
                have = ", ".join(sorted(key.removeprefix("eval_") for key in found)) or "nothing"
                raise StageError(
                    f"metrics_to_track: {missing[0]!r} was not measured; custom_evaluation_function returned {have}"
                )
        return output

    def _own_metrics(self, prefix: str) -> dict[str, float]:
        assert self.hooks.evaluate is not None
        trainer: Any = self
        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                found = self.hooks.evaluate(model, trainer.eval_dataset)
        finally:
            model.train(was_training)
        if not isinstance(found, Mapping) or not all(isinstance(value, int | float) for value in found.values()):
            raise StageError(
                f"custom_evaluation_function returned {found!r}; it returns a mapping of names to numbers"
            )
        return {f"{prefix}_{name}": float(value) for name, value in found.items()}

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Where only the best is kept, a trainer that is asked to stop right after an evaluation saves too."""
        best = super()._determine_best_metric(*args, **kwargs)  # type: ignore[misc]
        return bool(best) or (self.hooks.must_save is not None and self.hooks.must_save())

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Say that no row is left, where TRL would fail on an empty list of tensors. Of several processes the first
        writes the numbers to a file, which the others find in its temporary folder and not in theirs."""
        if len(dataset) == 0:
            trainer: Any = self
            raise StageError(
                f"none of the {name} rows is left; their prompts are longer than max_length "
                f"({trainer.args.max_length}). Raise trl.max_length"
            )
        if live_processes() > 1:
            place = ranks.tell(dataset._get_cache_file_path(""))
            dataset = copy.copy(dataset)
            dataset._get_cache_file_path = lambda fingerprint: place
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Remember how many optimiser steps an epoch has."""
        found = super().set_initial_training_values(*args, **kwargs)  # type: ignore[misc]
        self._steps_per_epoch = found[1]
        return found

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The user's own loss, where there is one."""
        if self.hooks.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        return own_loss(self, self.hooks.loss, model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Show the loss of the batch to who wants to see it."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.hooks.sees_loss is not None:
            self.hooks.sees_loss(loss)
        return loss

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The mean loss takes in the steps after the last log line, of all processes and not of the first alone."""
        trainer: Any = self
        trainer._tr_loss.fill_(ranks.mean(float(trainer._tr_loss)))
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Add the first scale of fp16, for which there is no argument."""
        found: dict[str, Any] = super()._build_accelerator_args(**kwargs)  # type: ignore[misc]
        if self.hooks.loss_scale is not None:
            from accelerate.utils import GradScalerKwargs

            found["kwargs_handlers"].append(GradScalerKwargs(init_scale=self.hooks.loss_scale))
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Let the stage say what is trained, then make the optimiser."""
        if self.hooks.before_optimizer is not None:
            self.hooks.before_optimizer()
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stage's own schedule, where it has one."""
        trainer: Any = self
        if self.hooks.schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if trainer.lr_scheduler is None:
            warmup = trainer.args.get_warmup_steps(num_training_steps)
            factor = self.hooks.schedule(warmup, num_training_steps, self._steps_per_epoch)
            trainer.lr_scheduler = make_scheduler(optimizer or trainer.optimizer, factor)
            trainer._created_lr_scheduler = True  # else a second train() would keep this one
        return trainer.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the stage's tags into the model card."""
        tags = kwargs.get("tags") or []
        kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), *self.hooks.tags]
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]


def _refuse_twice(texts: TextEvaluation | None, found: Mapping[str, float], prefix: str) -> None:
    """One name cannot stand for two metrics."""
    for name in texts.names if texts is not None else ():
        if f"{prefix}_{name}" in found:
            raise StageError(f"custom_evaluation_function returned {name!r}, which stagekit measures; rename yours")
