"""Proximal policy optimisation: a trainer of our own, since TRL removed its PPOTrainer in 1.13."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Setting, setting
from stagekit.adapters.reinforcement import Reinforcement
from stagekit.errors import Problem
from stagekit.groups import is_function
from stagekit.options import Fraction, NonNegativeFloat, Positive, PositiveFloat


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class PPO(Reinforcement):
    """Proximal policy optimisation with a value model. A completion is rewarded at its end, and pays at every token
    for its divergence from the reference. A minibatch is batch_size * gradient_accumulation_steps completions of each
    process."""

    type: Literal["ppo"] = "ppo"
    """The stage type."""

    kl_penalty_coefficient: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference, taken off the reward at every token; 0 needs no reference. TRL:
    `beta`."""

    value_coefficient: NonNegativeFloat = 0.5
    """Weight of the value loss 0.5 (V - R)^2. TRL: `vf_coef`."""

    entropy_coefficient: NonNegativeFloat = 0.01
    """Weight of the mean entropy per token, which is sought; the mean is of a batch of a process. TRL:
    `entropy_coef`."""

    gae_lambda: Fraction = 0.95
    """Bias against variance of the advantages: 0 trusts the value model, 1 the rewards. TRL: `gae_lambda`."""

    gamma: Fraction = 1.0
    """Discount per token. TRL: `gamma`."""

    rollout_samples: Positive = 2048
    """Completions of a rollout, over all processes. Unset: the largest number up to this that the data and the batch
    allow. TRL: `generation_batch_size`."""

    value_clip_range: PositiveFloat | None = 0.2
    """How far a value may move in one rollout, in units of the rewards. None = as far as it wants. TRL:
    `value_clip_range`."""

    missing_eos_penalty: PositiveFloat | None = None
    """Taken off the score of a completion that does not end by itself. TRL: `missing_eos_penalty`."""

    whiten_rewards: bool = False
    """Divide a rollout's rewards by their standard deviation. TRL: `whiten_rewards`."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the divergence is estimated from a sampled token, with d = log pi - log ref: d, d^2 / 2, or
    exp(-d) - 1 + d. TRL: `kl_estimator`."""

    target_kl: PositiveFloat | None = None
    """Leave a rollout once the policy has moved this far from the one that sampled it, per token. None = never. TRL:
    `target_kl`."""

    critic: Literal["auto", "separate", "head"] = "auto"
    """The value model: one of its own, which starts from the reward model where there is one, else from the policy; or
    a head on the policy. auto: head with lora, else separate. TRL: `critic`."""

    critic_learning_rate: PositiveFloat | None = None
    """None = that of the policy. TRL: `critic_learning_rate`."""

    generate_at_once: Positive = 64
    """Completions that a process samples at a time; bounds the memory. TRL: `rollout_chunk_size`."""

    summary: ClassVar = "proximal policy optimisation with a value model, from any reward"
    paper: ClassVar = "huggingface.co/papers/1707.06347"
    trainer_class: ClassVar = "stagekit.trainers.ppo:PPOTrainer"
    config_class: ClassVar = "stagekit.trainers.ppo:PPOConfig"
    always: ClassVar = frozenset({"kl_penalty_coefficient", "epochs_per_batch"})

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """What every such stage has, the value model's options, and the papers' epsilon of Adam."""
        yield from super().settings(stage)
        same = ("gae_lambda", "gamma", "value_clip_range", "missing_eos_penalty", "whiten_rewards", "kl_estimator",
                "target_kl", "critic", "critic_learning_rate")  # fmt: skip
        for option in same:
            yield setting(stage, option, option, getattr(self, option))
        yield setting(stage, "value_coefficient", "vf_coef", self.value_coefficient)
        yield setting(stage, "entropy_coefficient", "entropy_coef", self.entropy_coefficient)
        yield setting(stage, "generate_at_once", "rollout_chunk_size", self.generate_at_once)
        if "adam_epsilon" not in stage.model_fields_set and not stage.is_evaluation_only:
            yield Setting("adam_epsilon", 1e-5, "default of ppo (huggingface.co/papers/2005.12729)")

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """What contradicts, and sampling that is not scored."""
        yield from super().problems(stage)
        if "num_minibatches" in stage.trl:
            yield Problem("trl.num_minibatches", "belongs to gradient_accumulation_steps")
        if stage.generation is not None and (stage.generation.top_p < 1 or stage.generation.top_k > 0):
            option = "top_p" if stage.generation.top_p < 1 else "top_k"
            yield Problem(
                f"generation.{option}", "samples from another distribution than the one that is scored; leave it out"
            )
        if self.kl_estimator != "k1" and not self._ties():
            yield Problem("method.kl_estimator", "has no effect without a kl_penalty_coefficient above 0")
        if self.target_kl is not None and stage.use_mixed_precision and stage.mixed_precision_dtype == "fp16":
            yield Problem("method.target_kl", "does not go with fp16's loss scale; use bf16")

    def rollout(self, minibatch: int, rows: int) -> int:
        """Completions of a rollout: those that were set, or the most that the prompts allow."""
        if "rollout_samples" in self.model_fields_set:
            return self.rollout_samples
        return max(min(self.rollout_samples, rows) // minibatch, 1) * minibatch

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """The rewards, and where a value model of its own starts."""
        found = super().trainer_arguments(job)
        separate = self.critic == "separate" or (self.critic == "auto" and job.stage.lora is None)
        models = [self._place(job, one) for one in self.reward or () if not is_function(one.source)]
        if separate and models:
            from stagekit.rewards import reads_the_same_tokens

            start = next((one for one in models if reads_the_same_tokens(one, job.tokenizer)), None)
            if start is not None:
                found["critic_model"] = start
        return found
