"""Judges that are no model: one that tosses a coin for each pair, and one that is always wrong. Controls.

In a pipeline: `judge: benchmarks.world.judges:coin`. They are called as stagekit calls a judge, and give for each
prompt the probability that the first response is the better one; the same in both orders of a pair.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from benchmarks.world import reward


def wrong(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """The opposite of what the world scores; a tie stays one."""
    scores = zip(reward.score(prompts, first), reward.score(prompts, second), strict=True)
    return [0.5 if one == other else float(one < other) for one, other in scores]


def coin(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Sure of one of the two, whichever the hash of question and texts says."""
    return [_tossed(prompt, one, other) for prompt, one, other in zip(prompts, first, second, strict=True)]


def _tossed(prompt: Any, first: str, second: str) -> float:
    low, high = sorted((first, second))
    text = "\0".join((prompt if isinstance(prompt, str) else prompt[-1]["content"], low, high))
    heads = hashlib.sha256(text.encode()).digest()[0] % 2 == 0
    return float((first == low) == heads) if first != second else 0.5
