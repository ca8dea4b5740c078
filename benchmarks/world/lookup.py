"""Which question a text asks: rewards and checks find the truth behind a prompt by its words alone."""

from functools import cache

from benchmarks.world.families import FAMILIES, Question
from benchmarks.world.world import NEW_KINDS, Split, new_kind


@cache
def questions_by_text() -> dict[str, Question]:
    """Every question that can be asked, of all splits and the held-out kinds. About a second the first time."""
    found = {
        text: Question(name, item, text)
        for name, family in FAMILIES.items()
        for item in family.items()
        for text in family.phrasings(item)
    }
    splits: tuple[Split, ...] = ("dev", "test")
    return found | {one.text: one for kind in NEW_KINDS for split in splits for one in new_kind(kind, split)}


def question_of(text: str) -> Question | None:
    """The question that a text asks; None where it asks none of this world's."""
    return questions_by_text().get(text.strip())
