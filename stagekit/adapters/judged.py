"""What the types with a judge share: what keeps it from being asked."""

from collections.abc import Iterable, Sequence

from stagekit.errors import Problem
from stagekit.groups import is_function
from stagekit.templates import COMPARISON_FIELDS, fields_of, wrong_with


def comparison_problems(
    template: str | None, principles: Sequence[str] | None, choices: Sequence[str] = ("A", "B")
) -> Iterable[Problem]:
    """What keeps a judge from being asked to compare."""
    if template is not None:
        several = principles is None or len(principles) > 1
        needed = ("first", "second", *(("principle",) if several else ()))
        wrong = wrong_with(template, COMPARISON_FIELDS, needed)
        if wrong:
            yield Problem("method.comparison", wrong)
        elif principles is not None and "principle" not in fields_of(template):
            yield Problem("method.principles", "has no effect: method.comparison has no field {principle}")
    if principles is not None and not principles:
        yield Problem("method.principles", "an empty list decides nothing; leave it out for the default set")
    for place, one in enumerate(principles or ()):
        if not one.strip():
            yield Problem(f"method.principles.{place}", "is empty; write what decides between two responses")
    if len(set(principles or ())) < len(principles or ()):
        yield Problem("method.principles", "names one twice; each is drawn as often as the others")
    one, other = choices
    if not one.strip() or not other.strip() or one.startswith(other) or other.startswith(one):
        yield Problem("method.choices", f"{one!r} and {other!r} cannot be told apart; for instance A and B")


def judge_problems(judge: object, writes: bool) -> Iterable[Problem]:
    """A function judges pairs and writes nothing."""
    if writes and judge is not None and is_function(judge):
        yield Problem(
            "method.judge",
            "a function compares, and writes neither reasons nor scores; name a model, a server, or none",
        )
