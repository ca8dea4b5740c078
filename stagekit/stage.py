"""A stage: the options that every stage has, the slots, and the door for the specification's flat names."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from stagekit.adapters import MethodField
from stagekit.adapters.sft import SFT
from stagekit.flat import as_spelled, path_as_spelled, to_flat, to_slots
from stagekit.groups import Gate, Generation, LoRA, Model, Reference, TextMetrics
from stagekit.ledger import problems_of_stage
from stagekit.options import raise_problems, values_only
from stagekit.selectors import TABLES
from stagekit.stage_options import StageOptions


class TrainingStage(StageOptions):
    """One stage of a pipeline: what to train, on what, how. Immutable; see `stagekit stages` for every option.

    Accepts its own names and, at the door, the specification's 108 flat ones (`dpo_beta`, `use_lora`, ...), which are
    moved into the slots. Raises ConfigError with everything that is wrong, at once.
    """

    method: MethodField = SFT()
    """What the stage does: an object such as `DPO(beta=0.1)`, or a type's name."""

    model: Model = None
    """The model to start from. None = the result of the stage before, or the pipeline's model."""

    lora: LoRA | None = None
    """Train an adapter instead of the full weights."""

    reference: Reference | None = None
    """Which model a preference method is compared with. None = `Reference()`."""

    generation: Generation | None = None
    """How a method that writes its own data samples. None = `Generation()`."""

    text_metrics: TextMetrics | None = None
    """How answers are written and judged where a metric of texts is asked for. None = `TextMetrics()`."""

    gate: Gate | None = None
    """What must hold for the stage's model to be passed on. None = nothing."""

    scheduler_kwargs: Mapping[str, Any] = {}
    """Arguments of the schedule that have no option of their own (`gamma`, `milestones`, `pct_start`, ...); see
    `stagekit/schedules.py` for those of each and their defaults."""

    trl: Mapping[str, Any] = {}
    """Arguments of the TRL config that stagekit has no option for (`max_length`, `packing`, ...); a key that one of
    stagekit's options owns counts only where that option is not set."""

    def _build(self, given: dict[str, Any]) -> None:
        slots, problems = to_slots(given)
        try:
            BaseModel.__init__(self, **slots)
        except ValidationError as error:
            raise_problems(type(self), problems, error, partial(as_spelled, given))
        if not values_only.get() and not any(problem.path in TABLES for problem in problems):
            problems += [one._replace(path=path_as_spelled(given, one.path)) for one in problems_of_stage(self)]
        raise_problems(type(self), problems)

    @property
    def path(self) -> str:
        """Where the stage stands in messages and overrides."""
        return f"stages.{self.name}"

    def resolved_learning_rate(self) -> float:
        """The learning rate that is used: what was set, here or in `trl`, or the method's default (ten times that with
        LoRA)."""
        if self.learning_rate is not None:
            return self.learning_rate
        if isinstance(self.trl.get("learning_rate"), int | float):
            return float(self.trl["learning_rate"])
        return float(f"{self.method.default_learning_rate * (10 if self.lora is not None else 1):.12g}")

    @property
    def max_duration_seconds(self) -> float | None:
        """`max_duration` as a number; None = no limit."""
        return None if self.max_duration is None else self.max_duration.total_seconds()

    def to_flat(self, only_set: bool = False) -> dict[str, Any]:
        """The stage in the specification's names: all 108 with their values, or only those that were set.

        Raises:
            ConfigError: with `only_set`, naming each path that the flat names cannot say.
        """
        return to_flat(self, only_set)
