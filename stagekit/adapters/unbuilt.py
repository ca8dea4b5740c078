"""Stage types that are declared, with their options and defaults, but not built yet: using one is a ConfigError.

Each moves into a file of its own, with its trainer, when it is built; `missing` says what it waits for.
"""

from typing import Any, ClassVar, Literal

from stagekit.adapters.base import Method
from stagekit.options import NonNegativeFloat, Positive, PositiveFloat


class RejectionSampling(Method):
    """Sample several answers, keep the best by reward, fine-tune on them."""

    type: Literal["rejection_sampling"] = "rejection_sampling"
    """The stage type."""
    reward: Any = None
    """What scores the answers."""
    n: Positive = 10
    """Answers per prompt."""
    top_k: Positive = 1
    """Answers kept per prompt."""
    min_reward: float | None = 0.0
    """Keep only answers with a reward above this. None = no threshold."""

    summary: ClassVar = "sample several answers, keep the best by reward, fine-tune on them"
    paper: ClassVar = "huggingface.co/papers/2304.06767"
    missing: ClassVar = "the sampling trainer"


class SelfPlay(Method):
    """SPIN: prefer the data's answers to the model's own, over and over."""

    type: Literal["self_play"] = "self_play"
    """The stage type."""
    iterations: Positive = 3
    """Rounds of generating and preferring."""
    temperature: NonNegativeFloat = 0.7
    """Sampling temperature of the opponent."""
    responses_per_prompt: Positive = 4
    """The opponent's answers per prompt."""
    beta: PositiveFloat = 0.1
    """Strength of the tie to the opponent."""

    summary: ClassVar = "SPIN: prefer the data's answers to the model's own"
    paper: ClassVar = "huggingface.co/papers/2401.01335"
    missing: ClassVar = "the self-play trainer"
