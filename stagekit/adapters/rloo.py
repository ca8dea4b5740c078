"""REINFORCE with a leave-one-out baseline: TRL's RLOOTrainer, with checkpoints that go on with the same bits."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.base import Setting, setting
from stagekit.adapters.reinforcement import Grouped
from stagekit.options import NonNegativeFloat, Positive


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


class RLOO(Grouped):
    """REINFORCE with a leave-one-out baseline: a completion is as good as its reward, less its divergence from the
    reference, is above the mean of the others of its group."""

    type: Literal["rloo"] = "rloo"
    """The stage type."""

    kl_penalty_coefficient: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference, taken off the reward. Used where it is set; else 0.05, as in TRL.
    TRL: `beta`."""

    epochs_per_batch: Positive = 4
    """Passes over the completions of one rollout. Used where it is set; else 1, as in TRL. TRL: `num_iterations`."""

    rollout_samples: Positive = 2048
    """Completions of a rollout, over all processes. Used where it is set; else those of one optimiser step, as in TRL.
    TRL: `generation_batch_size`."""

    whiten_advantages: bool = False
    """Give the advantages of a rollout mean 0 and standard deviation 1. TRL: `normalize_advantages`."""

    summary: ClassVar = "REINFORCE with a leave-one-out baseline, from any reward"
    paper: ClassVar = "huggingface.co/papers/2402.14740"
    trainer_class: ClassVar = "stagekit.trainers.rollouts:ExactRLOOTrainer"
    config_class: ClassVar = "trl:RLOOConfig"

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """What every such stage has, and what becomes of the advantages."""
        yield from super().settings(stage)
        yield setting(stage, "whiten_advantages", "normalize_advantages", self.whiten_advantages)

    def _ties(self) -> bool:
        """TRL's RLOO has a reference unless the coefficient is 0."""
        return "kl_penalty_coefficient" not in self.model_fields_set or self.kl_penalty_coefficient > 0
