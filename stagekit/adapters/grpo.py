"""Group-relative policy optimisation: TRL's GRPOTrainer, with checkpoints that go on with the same bits."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.base import Setting, setting
from stagekit.adapters.reinforcement import Grouped
from stagekit.errors import Problem
from stagekit.options import NonNegativeFloat, Positive


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


class GRPO(Grouped):
    """Group-relative policy optimisation: a completion is as good as its reward is above the mean of its group. No
    value model. The divergence from the reference, and several passes over a rollout, are used where they are set."""

    type: Literal["grpo"] = "grpo"
    """The stage type."""

    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How the tokens' losses become one number: dapo: over all tokens of a minibatch, with all processes; bnpo: of a
    process; grpo: per completion first, which favours short ones; dr_grpo: over the longest possible length, with
    `relative_rewards: false` as in its paper; cispo, sapo, luspo, vespo as in TRL. TRL: `loss_type`."""

    relative_rewards: bool = True
    """Divide a group's rewards by their standard deviation; the mean of the group is taken off either way. TRL:
    `scale_rewards`."""

    kl_penalty_coefficient: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference in the loss. Used where it is set; else there is none, as in TRL.
    TRL: `beta`."""

    entropy_coefficient: NonNegativeFloat = 0.01
    """Weight of the mean entropy per token, which is sought; the mean is of a batch of a process. Used where it is
    set; else 0, as in TRL. TRL: `entropy_coef`."""

    epochs_per_batch: Positive = 4
    """Passes over the completions of one rollout. Used where it is set; else 1, as in TRL. TRL: `num_iterations`."""

    rollout_samples: Positive = 2048
    """Completions of a rollout, over all processes. Used where it is set; else those of one optimiser step, as in TRL.
    TRL: `generation_batch_size`."""

    summary: ClassVar = "group-relative policy optimisation, from any reward"
    paper: ClassVar = "huggingface.co/papers/2402.03300"
    trainer_class: ClassVar = "stagekit.trainers.rollouts:ExactGRPOTrainer"
    config_class: ClassVar = "trl:GRPOConfig"

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """What every such stage has, and the loss."""
        yield from super().settings(stage)
        yield setting(stage, "loss", "loss_type", self.loss)
        yield setting(stage, "relative_rewards", "scale_rewards", "group" if self.relative_rewards else "none")
        if "entropy_coefficient" in self.model_fields_set:
            yield setting(stage, "entropy_coefficient", "entropy_coef", self.entropy_coefficient)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Losses that do not clip."""
        yield from super().problems(stage)
        if "clip_range" in self.model_fields_set and self.loss in {"sapo", "vespo"}:
            yield Problem("method.clip_range", f"has no effect on the loss {self.loss!r}, which does not clip")
