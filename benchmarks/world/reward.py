"""The world's scores as rewards, and what has no knowledge of them as controls.

In a pipeline: `reward: benchmarks.world.reward:score`. They are called as stagekit and TRL call reward functions, with
`prompts` and `completions`, conversations or texts, and give one number per completion.
"""

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any

from benchmarks.world import families
from benchmarks.world.lookup import question_of


def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """What the world scores each completion, in [0, 1].

    Raises:
        ValueError: a prompt is no question of this world; names it.
    """
    return [_score(_text(prompt), _text(one)) for prompt, one in zip(prompts, completions, strict=True)]


def shuffled(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The scores of the call's completions, dealt out among them in a drawn order: a control.

    The rewards have the same distribution and say nothing of the completion that gets them. The order is drawn from
    what is scored, so it is the same where the call is repeated.

    Raises:
        ValueError: a prompt is no question of this world, or there is one completion alone, which would get its own.
    """
    found = score(prompts, completions)
    if len(found) < 2:
        raise ValueError("a single completion cannot be given another's score; score them in larger batches")
    texts = [(_text(prompt), _text(one)) for prompt, one in zip(prompts, completions, strict=True)]
    Random(repr(texts)).shuffle(found)
    return found


def arbitrary(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A number in [0, 1) from the hash of prompt and completion: a control that is the same in every batch."""
    return [_hashed(_text(prompt), _text(one)) for prompt, one in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    question = question_of(prompt)
    if question is None:
        raise ValueError(f"no question of this world: {prompt!r}")
    return families.score(question, completion)


def _hashed(prompt: str, completion: str) -> float:
    digest = hashlib.sha256(f"{prompt}\0{completion}".encode()).digest()
    return float(int.from_bytes(digest[:6]) / 2**48)


def _text(given: Any) -> str:
    """The text itself, or that of a conversation's last turn."""
    return str(given if isinstance(given, str) else given[-1]["content"])
