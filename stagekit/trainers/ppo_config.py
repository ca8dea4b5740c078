"""The arguments of `PPOTrainer`."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from trl import GRPOConfig

from stagekit.errors import ConfigError, Problem
from stagekit.trainers.ppo_losses import KLEstimator


MOST_SAMPLES = 2048
"""The size of a rollout where none is given and the data allow it."""

_OTHER_OBJECTIVE: Mapping[str, str] = {
    "loss_type": "the value loss is normalised as in dapo",
    "importance_sampling_level": "advantages are per token, and so is the ratio",
    "scale_rewards": "there are no groups; see whiten_rewards and whiten_advantages",
    "multi_objective_aggregation": "there are no groups; rewards are weighted and summed",
    "off_policy_mask_threshold": "it needs one advantage per completion",
    "use_bias_correction_kl": "the KL is in the reward, not in the loss",
    "top_entropy_quantile": "the value model learns from all tokens",
}
"""Arguments of GRPO that PPO does not read -> why."""

_OTHER_SAMPLING: Mapping[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
_OTHER_GENERATION = {
    *_OTHER_SAMPLING, "temperature", "do_sample", "num_beams", "min_new_tokens", "min_length",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
}  # fmt: skip


@dataclass
class PPOConfig(GRPOConfig):  # type: ignore[misc]
    """Arguments of `PPOTrainer`: those of `trl.GRPOConfig`, some with other defaults, and PPO's own.

    A rollout is `generation_batch_size` completions over all processes (or `steps_per_generation` micro-batches);
    where neither is given it is the largest number up to 2048 that the data and the batch allow. It is passed over
    `num_iterations` times. A minibatch, which is one optimiser step, is per_device_train_batch_size *
    gradient_accumulation_steps * processes completions.

    Args:
        num_generations: Completions of each prompt in a rollout.
        num_iterations: Passes over a rollout (PPO epochs).
        beta: Weight of the KL from the reference, taken off the reward at every token; 0 needs no reference.
        entropy_coef: Weight of the mean entropy per token, added to the objective.
        disable_dropout: Off in policy, reference and value model; with dropout the ratio of the first step is not 1.
        adam_epsilon: As in the papers; the usual 1e-8 makes the first steps larger.
        gamma: Discount per token.
        gae_lambda: Bias against variance of the advantages: 0 trusts the value model, 1 the rewards.
        vf_coef: Weight of the value loss, which is 0.5 (V - R)^2 by itself.
        value_clip_range: How far a value may move in one rollout, in units of the rewards. None: as far as it wants.
        critic: "separate": a value model of its own, without sharing weights; "head": a linear layer on the policy's
            last hidden states; "auto": head with an adapter, else separate.
        critic_learning_rate: None: that of the policy.
        missing_eos_penalty: Taken off the score of a completion that does not end with EOS.
        whiten_rewards: Divide the rewards of a rollout by their standard deviation; the mean stays.
        whiten_advantages: Give the advantages of a rollout mean 0 and standard deviation 1.
        kl_estimator: "k1", "k2" or "k3"; see `stagekit.trainers.ppo_losses.kl_estimate`.
        target_kl: Leave a rollout for the next once the policy has moved this far from the one that sampled it, as an
            approximate KL per token. None: never.
        num_minibatches: Minibatches of a rollout; sets gradient_accumulation_steps. None: what that gives.
        reshuffle: Put a rollout into other minibatches at each pass.
        rollout_chunk_size: Completions that are generated at once, per process; bounds the memory of the cache.
        logit_chunk_size: Tokens whose logits are held at once, per process: logit_chunk_size * vocabulary numbers, a
            few times over. None: 128 on the CPU, where few stay in its caches; TRL's own number elsewhere.

    Raises:
        ConfigError: arguments of GRPO that PPO does not have, sampling that the log-probabilities do not describe, or
            sizes that do not divide.
    """

    num_generations: int | None = 1
    num_generations_eval: int | None = 1
    generation_batch_size: int | None = None
    steps_per_generation: int | None = None
    num_iterations: int = 4
    beta: float = 0.01
    entropy_coef: float = 0.01
    disable_dropout: bool = True
    adam_epsilon: float = 1e-5
    gamma: float = 1.0
    gae_lambda: float = 0.95
    vf_coef: float = 0.5
    value_clip_range: float | None = 0.2
    critic: Literal["auto", "separate", "head"] = "auto"
    critic_learning_rate: float | None = None
    missing_eos_penalty: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    kl_estimator: KLEstimator = "k1"
    target_kl: float | None = None
    num_minibatches: int | None = None
    reshuffle: bool = True
    rollout_chunk_size: int = 64
    logit_chunk_size: int | None = None

    def __post_init__(self) -> None:
        """Check what GRPO checks, but for its groups of at least two, then what PPO asks for."""
        given = (self.num_generations, self.generation_batch_size, self.steps_per_generation)
        if given[1] is not None and given[2] is not None:
            raise ConfigError("generation_batch_size and steps_per_generation both say how large a rollout is")
        self.num_generations, self.generation_batch_size, self.steps_per_generation = 2, None, 2
        super().__post_init__()
        self.num_generations, self.generation_batch_size, self.steps_per_generation = given
        problems = [*_other_objective(self), *_other_sampling(self), *_out_of_range(self)]
        if problems:
            raise ConfigError(problems)
        if self.steps_per_generation is not None:
            self.set_rollout(self.steps_per_generation * self._micro_batch)
        elif self.generation_batch_size is not None:
            self.set_rollout(self.generation_batch_size)

    @property
    def _micro_batch(self) -> int:
        """Completions of one backward pass, over all processes."""
        return int(self.per_device_train_batch_size * self.world_size)

    def rollout_unit(self) -> int:
        """What the size of a rollout must be a multiple of: whole minibatches of whole groups."""
        count = self.num_minibatches if self.num_minibatches is not None else self.gradient_accumulation_steps
        return math.lcm(self._micro_batch * count, self.num_generations or 1)

    def rollout_for(self, prompts: int) -> int:
        """The largest rollout up to 2048 completions that so many prompts can fill, or one unit if they cannot."""
        unit = self.rollout_unit()
        most = min(MOST_SAMPLES, prompts * (self.num_generations or 1))
        return max(most // unit, 1) * unit

    def set_rollout(self, samples: int) -> None:
        """Make a rollout `samples` completions.

        Raises:
            ConfigError: they are not whole minibatches of whole groups.
        """
        unit = self.rollout_unit()
        if samples < 1 or samples % unit:
            split = "num_minibatches" if self.num_minibatches is not None else "gradient_accumulation_steps"
            raise ConfigError(
                f"generation_batch_size: a rollout of {samples} completions is no multiple of {unit} "
                f"(per_device_train_batch_size * processes * {split}, in whole groups of num_generations)"
            )
        self.generation_batch_size = samples
        self.steps_per_generation = samples // self._micro_batch
        if self.num_minibatches is not None:
            self.gradient_accumulation_steps = self.steps_per_generation // self.num_minibatches

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps that a rollout is used for."""
        assert self.steps_per_generation is not None, "the rollout has no size yet"
        return int(self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps)


def _other_objective(config: PPOConfig) -> list[Problem]:
    defaults = {field.name: field.default for field in fields(GRPOConfig) if field.default is not MISSING}
    return [
        Problem(name, f"{getattr(config, name)!r} has no effect in PPO: {why}; leave it out")
        for name, why in _OTHER_OBJECTIVE.items()
        if getattr(config, name) != defaults[name]
    ]


def _other_sampling(config: PPOConfig) -> list[Problem]:
    why = "samples from another distribution than the one that is scored, which makes the KL negative; leave it out"
    given = {name: getattr(config, name) for name in _OTHER_SAMPLING}
    found = [Problem(name, f"{value!r} {why}") for name, value in given.items() if value != _OTHER_SAMPLING[name]]
    extra = config.generation_kwargs if isinstance(config.generation_kwargs, Mapping) else {}
    return found + [Problem(f"generation_kwargs.{name}", why) for name in sorted(set(extra) & _OTHER_GENERATION)]


def _out_of_range(config: PPOConfig) -> list[Problem]:
    found = []
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(config, name) <= 1:
            found.append(Problem(name, f"{getattr(config, name)!r} is not between 0 and 1"))
    for name in ("num_iterations", "num_generations", "rollout_chunk_size", "num_minibatches", "logit_chunk_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            found.append(Problem(name, f"{value!r} is not at least 1"))
    for name in ("value_clip_range", "target_kl", "critic_learning_rate"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            found.append(Problem(name, f"{value!r} is not above 0; None leaves it out"))
    for name in ("vf_coef", "beta"):
        if getattr(config, name) < 0:
            found.append(Problem(name, f"{getattr(config, name)!r} is not at least 0"))
    for name, known in (("critic", ("auto", "separate", "head")), ("kl_estimator", ("k1", "k2", "k3"))):
        if getattr(config, name) not in known:
            found.append(Problem(name, f"{getattr(config, name)!r} is none of {', '.join(known)}"))
    if config.num_minibatches is not None and config.gradient_accumulation_steps != 1:
        found.append(Problem("num_minibatches", "gradient_accumulation_steps says the same; give one of them"))
    if config.target_kl is not None and config.fp16:
        found.append(
            Problem("target_kl", "a step that is left out and fp16's loss scale do not go together; use bf16")
        )
    return found
