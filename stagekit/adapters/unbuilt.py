"""Stage types that are declared, with their options and defaults, but not built yet: using one is a ConfigError.

Each moves into a file of its own, with its trainer, when it is built; `missing` says what it waits for.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from stagekit.adapters.base import Method
from stagekit.groups import Model
from stagekit.options import Count, Fraction, NonNegativeFloat, Positive, PositiveFloat


class PPO(Method):
    """Proximal policy optimisation with a value model."""

    type: Literal["ppo"] = "ppo"
    """The stage type."""
    reward: Any = None
    """What scores completions: `stage:NAME`, a model, or a function."""
    kl_penalty_coefficient: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference in the reward."""
    clip_range: PositiveFloat = 0.2
    """How far one update may move the probability ratio from 1."""
    value_coefficient: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    entropy_coefficient: NonNegativeFloat = 0.01
    """Weight of the entropy bonus."""
    gae_lambda: Fraction = 0.95
    """Trade of bias against variance in the advantages."""
    epochs_per_batch: Positive = 4
    """Passes over the completions of one rollout."""
    rollout_samples: Positive = 2048
    """Completions per rollout."""

    summary: ClassVar = "proximal policy optimisation with a value model"
    paper: ClassVar = "huggingface.co/papers/1707.06347"
    missing: ClassVar = "a PPO trainer of our own (TRL removed its own in 1.13)"


class GRPO(Method):
    """Group-relative policy optimisation."""

    type: Literal["grpo"] = "grpo"
    """The stage type."""
    reward: Any = None
    """What scores completions: `stage:NAME`, a model, a function, or a list of them."""
    group_size: Positive = 4
    """Completions per prompt."""
    relative_rewards: bool = True
    """Divide the rewards of a group by their spread."""
    kl_penalty_coefficient: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference."""
    clip_range: PositiveFloat = 0.2
    """How far one update may move the probability ratio from 1."""
    entropy_coefficient: NonNegativeFloat = 0.01
    """Weight of the entropy bonus."""
    epochs_per_batch: Positive = 4
    """Passes over the completions of one rollout."""
    rollout_samples: Positive = 2048
    """Completions per rollout."""

    summary: ClassVar = "group-relative policy optimisation"
    paper: ClassVar = "huggingface.co/papers/2402.03300"
    missing: ClassVar = "the GRPO adapter and its rewards"


class RLOO(Method):
    """REINFORCE with a leave-one-out baseline."""

    type: Literal["rloo"] = "rloo"
    """The stage type."""
    reward: Any = None
    """What scores completions."""
    kl_penalty_coefficient: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference in the reward."""
    clip_range: PositiveFloat = 0.2
    """How far one update may move the probability ratio from 1."""
    epochs_per_batch: Positive = 4
    """Passes over the completions of one rollout."""
    rollout_samples: Positive = 2048
    """Completions per rollout."""

    summary: ClassVar = "REINFORCE with a leave-one-out baseline"
    paper: ClassVar = "huggingface.co/papers/2402.14740"
    missing: ClassVar = "the RLOO adapter and its rewards"


class Distillation(Method):
    """Learn a teacher's distribution: alpha * soft + (1 - alpha) * hard."""

    type: Literal["distillation"] = "distillation"
    """The stage type."""
    teacher: Model = None
    """The larger model to learn from."""
    temperature: PositiveFloat = 2.0
    """Softens both distributions; the soft term is scaled by its square."""
    alpha: Fraction = 0.5
    """Weight of the soft term."""
    hidden_states: bool = False
    """Also match intermediate layers."""
    layer_map: Mapping[int, Count] = {}
    """Teacher layer -> student layer. Empty = evenly spread."""

    summary: ClassVar = "learn a teacher's distribution, and its hidden states"
    paper: ClassVar = "huggingface.co/papers/1503.02531"
    missing: ClassVar = "the distillation trainer"
