"""Counter-based randomness: a draw depends on its name only, never on the order or the number of other draws.

So a resumed run, another batch size or a shuffled list of prompts draws the same for the same thing.
"""

import hashlib
import json
from typing import Any


def digest_of(*parts: Any) -> str:
    """The SHA-256, in hex, of JSON-serialisable `parts`: the same in every process and release."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def seed_of(seed: int, *parts: str) -> int:
    """A seed of 63 bits for the thing that `parts` name, under the run's `seed`."""
    return int(digest_of(seed, *parts)[:16], 16) >> 1


def draw(seed: int, *parts: str) -> float:
    """A number in [0, 1), uniform over all names `parts`, under the run's `seed`."""
    return (int(digest_of(seed, *parts)[:16], 16) >> 11) / 2**53
