"""The world of one seed: which questions it draws, for training, for tuning and for the test."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from benchmarks.world.families import FAMILIES, Item, Question, harmful_items, harmless_items
from benchmarks.world.words import DEV_WRAPPERS, TEST_WRAPPERS


Split = Literal["train", "dev", "test"]
TRAINED = ("arithmetic", "sorting", "harmful", "harmless", "review", "style", "known", "unknown")
"""Families that methods train on. `steps` is a family of its own, for step labels."""
NEW_KINDS = {"redteam": "harmful", "redteam_harmless": "harmless"}
"""Held-out kinds and the family that scores them: new phrasings about new things."""
MEASURED = (*TRAINED, *NEW_KINDS)


def split_of(family: str, item: Item) -> Split:
    """The split of an item: by its hash, so it is the same in every world and a base never saw a test item."""
    place = int.from_bytes(hashlib.sha256(f"{family}/{item!r}".encode()).digest()[:8]) % 10
    return "train" if place < 7 else "dev" if place == 7 else "test"


@cache
def items_of(family: str, split: Split) -> Sequence[Item]:
    """A family's items in a split, in a fixed order."""
    return tuple(item for item in FAMILIES[family].items() if split_of(family, item) == split)


@dataclass(frozen=True)
class World:
    """All that is drawn is decided by the seed and by what is asked for."""

    seed: int

    def rng(self, *purpose: object) -> Random:
        """Random numbers for one purpose, independent of those for any other."""
        return Random("/".join(map(str, (self.seed, *purpose))))

    def questions(self, family: str, split: Split, n: int, purpose: str = "") -> list[Question]:
        """`n` different questions of a family, or of a held-out kind (which only `dev` and `test` have)."""
        rng = self.rng("questions", family, split, purpose)
        pool = new_kind(family, split) if family in NEW_KINDS else None
        if pool is not None:
            return rng.sample(pool, n)
        items, count = items_of(family, split), len(FAMILIES[family].phrasings(items_of(family, split)[0]))
        places = rng.sample(range(len(items) * count), n)
        chosen = ((items[place // count], place % count) for place in places)
        return [Question(family, item, FAMILIES[family].phrasings(item)[phrasing]) for item, phrasing in chosen]

    def mixed(self, split: Split, n: int, families: Sequence[str] = TRAINED, purpose: str = "") -> list[Question]:
        """`n` different questions, as many of each family as of any other (give or take one), shuffled."""
        counts = [n // len(families) + (place < n % len(families)) for place in range(len(families))]
        drawn = [
            question
            for family, count in zip(families, counts, strict=True)
            for question in self.questions(family, split, count, purpose)
        ]
        self.rng("order", split, n, purpose, *families).shuffle(drawn)
        return drawn

    def held_out(self, split: Split, n: int, families: Sequence[str] = MEASURED) -> Mapping[str, list[Question]]:
        """`n` different questions of each measured family; the held-out kinds in `dev` have fewer where they must."""
        sizes = {family: len(new_kind(family, split)) if family in NEW_KINDS else n for family in families}
        return {family: self.questions(family, split, min(n, sizes[family])) for family in families}


@cache
def new_kind(kind: str, split: Split) -> list[Question]:
    """All questions of a held-out kind: the new things of the split in its new phrasings."""
    if split == "train":
        raise ValueError(f"{kind} is a held-out kind: it has no training questions")
    family = NEW_KINDS[kind]
    items = harmful_items(split) if family == "harmful" else harmless_items(split)
    wrappers = DEV_WRAPPERS if split == "dev" else TEST_WRAPPERS
    return [
        Question(family, item, wrapper.format(action=item[0], item=item[1])) for item in items for wrapper in wrappers
    ]
