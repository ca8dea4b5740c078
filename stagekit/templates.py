"""How responses are put to a judge: the texts around them, with fields in braces. Pure."""

import string
from collections.abc import Iterable, Sequence

from stagekit.requests import Message


COMPARISON_FIELDS = ("conversation", "principle", "first", "second")
SCORING_FIELDS = ("conversation", "response", "max_score")

COMPARISON = """Consider this conversation:

{conversation}

{principle}

(A) {first}

(B) {second}

Answer with A or B only."""
"""Asks which of two responses is better, in one word."""

REASONED_COMPARISON = """Consider this conversation:

{conversation}

{principle}

(A) {first}

(B) {second}

Think about it step by step: say briefly what speaks for each."""
"""Asks for the reasons first; `VERDICT` then asks for the word."""

VERDICT = "So which one is it? Answer with A or B only."

SCORING = """Consider this conversation:

{conversation}

and this response to it:

{response}

Rate the response with 0 to {max_score} points. It earns points for being about what was asked, for answering all of \
it, for being right, for being clear and well ordered, and for leaving out what is needless. Say in a few sentences \
why, and end with a line of its own: Score: POINTS"""
"""Asks for a score, on the last line."""


def filled(template: str, **values: object) -> str:
    """The template with its fields filled in; braces in the values stay as they are."""
    return template.format(**values)


def wrong_with(template: str, known: Sequence[str], needed: Iterable[str]) -> str | None:
    """What keeps a template of the user's from being filled; None where nothing does."""
    try:
        names = fields_of(template)
    except ValueError as error:
        return f"cannot be filled: {error}; a brace that is meant as one is doubled"
    unknown = sorted(name for name in names if name not in known)
    if unknown:
        return f"has a field {{{unknown[0]}}} that nothing fills; known are {_listed(known)}"
    missing = [name for name in needed if name not in names]
    return f"lacks {_listed(missing)}, so the judge would not see it" if missing else None


def fields_of(template: str) -> set[str]:
    """The names of the fields in a template.

    Raises:
        ValueError: single braces.
    """
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def as_text(messages: Sequence[Message]) -> str:
    """A conversation as a text: one turn of the user alone as it stands, else each turn behind its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
