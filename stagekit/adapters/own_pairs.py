"""What the types share that learn pairs of their own making by DPO, in iterations."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from stagekit.adapters.base import Method, Setting, setting
from stagekit.adapters.references import OWNED, cache_arguments, precomputes, reference_settings
from stagekit.errors import Problem
from stagekit.groups import is_server


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class OwnPairs(Method):
    """Base of `self_play` and `self_rewarding`: DPO's sigmoid loss, whose reference is the model that wrote the pairs.
    A subclass has the options `iterations`, `beta` and `stop_at_margin`."""

    if TYPE_CHECKING:
        iterations: int
        beta: float
        stop_at_margin: float | None

    trainer_class: ClassVar = "trl:DPOTrainer"
    config_class: ClassVar = "trl:DPOConfig"
    slots: ClassVar = frozenset({"model", "lora", "generation", "trl"})
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "custom": ""}
    whose: ClassVar[str] = "the model that wrote the pairs"
    """What the reference is, in the type's words."""

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """DPO's sigmoid loss, against the model at the start of the iteration."""
        yield Setting("loss_type", ["sigmoid"], stage.method.type)
        yield setting(stage, "beta", "beta", self.beta)
        yield from reference_settings(stage)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """What the method itself decides, and a server, which goes on serving the model of the first iteration."""
        kind = stage.method.type
        for key in OWNED:
            if key in stage.trl:
                yield Problem(f"trl.{key}", f"{kind}'s loss is DPO's sigmoid, and its reference is {self.whose}")
        if self.iterations > 1 and stage.generation is not None and is_server(stage.generation.backend):
            yield Problem(
                "generation.backend", "a server goes on serving the first iteration's model; use transformers"
            )
        if self.stop_at_margin is not None and stage.logging_steps == 0:
            yield Problem("method.stop_at_margin", "reads what is logged; set logging_steps above 0")
        if stage.is_evaluation_only:
            yield Problem("is_evaluation_only", f"{kind} only trains; measure with a stage of type evaluation or dpo")

    def trainings(self) -> int:
        """Once per iteration."""
        return self.iterations

    def trainer_for(self, stage: "TrainingStage") -> str:
        """TRL's trainer; with full weights the one that reads the reference once and remembers it."""
        return "stagekit.trainers.reference:CachedReferenceDPOTrainer" if precomputes(stage) else "trl:DPOTrainer"

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """Where precomputed log-probabilities are kept."""
        return cache_arguments(job)

    def callbacks(self, job: "Job") -> dict[str, Any]:
        """The guard."""
        if self.stop_at_margin is None:
            return {}
        from stagekit.trainers.self_play_trainer import StopAtMargin

        return {"margin": StopAtMargin(self.stop_at_margin)}

    def step0_loss(self, stage: "TrainingStage") -> float:
        """The policy is the reference: ln 2, in every iteration."""
        return math.log(2)
