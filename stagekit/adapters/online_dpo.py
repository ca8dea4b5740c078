"""Online DPO: a trainer of our own on TRL's sampling; TRL has it only as an experiment that may vanish."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Setting, setting
from stagekit.adapters.references import reference_of
from stagekit.adapters.reinforcement import Scored
from stagekit.errors import Problem
from stagekit.options import Positive, PositiveFloat


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class OnlineDPO(Scored):
    """DPO on what the policy says now: two completions of each prompt are sampled, scored and compared. Batch sizes
    count completions, so they are even."""

    type: Literal["online_dpo"] = "online_dpo"
    """The stage type."""

    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference, 0.01 to 0.5. TRL: `beta`."""

    preference_scale: PositiveFloat | None = None
    """s in P(one is better) = sigmoid((its score - the other's) / s). None = the one with the higher score is better,
    and a tie teaches nothing. TRL: `preference_scale`."""

    missing_eos_penalty: PositiveFloat | None = None
    """Taken off the score of a completion that does not end by itself. TRL: `missing_eos_penalty`."""

    epochs_per_batch: Positive = 1
    """Passes over the completions of one rollout. TRL: `num_iterations`."""

    rollout_samples: Positive = 2048
    """Completions of a rollout, over all processes. Used where it is set; else those of one optimiser step. TRL:
    `generation_batch_size`."""

    generate_at_once: Positive | None = None
    """Completions that a process samples at a time; bounds the memory. None = the whole rollout."""

    summary: ClassVar = "DPO on pairs that the policy samples and a reward judges"
    paper: ClassVar = "huggingface.co/papers/2402.04792"
    trainer_class: ClassVar = "stagekit.trainers.online_dpo:OnlineDPOTrainer"
    config_class: ClassVar = "stagekit.trainers.online_dpo:OnlineDPOConfig"
    tie: ClassVar = "beta"

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """What every such stage has, the tie, and the preference. Evaluations compare two as well."""
        yield from super().settings(stage)
        for option in ("beta", "preference_scale", "missing_eos_penalty"):
            yield setting(stage, option, option, getattr(self, option))
        yield Setting("num_generations_eval", 2, "stagekit (pairs)")

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Batches that cut a pair; no reference."""
        yield from super().problems(stage)
        if stage.batch_size % 2:
            yield Problem("batch_size", f"{stage.batch_size} completions cut a pair; make it even")
        if reference_of(stage).mode == "none":
            yield Problem("reference.mode", "'none' cannot be: online_dpo compares with a reference; leave it out")

    def group(self) -> int:
        """Completions of a prompt in a rollout."""
        return 2

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """The rewards, the order of prompts, and how much is sampled at a time."""
        return {**super().trainer_arguments(job), "chunk_size": self.generate_at_once}
