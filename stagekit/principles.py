"""Principles of Constitutional AI: what a critique looks for and what a revision is asked to do."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from stagekit.errors import ConfigError, Problem


@dataclass(frozen=True)
class Principle:
    """A critique request with the revision request that belongs to it; `name` stands in rows and reports."""

    name: str
    critique_request: str
    revision_request: str


_FIELDS = frozenset(Principle.__dataclass_fields__)


def principles_from(given: Sequence[str | Mapping[str, Any]]) -> tuple[Principle, ...]:
    """Principles as a user gives them: a sentence, or a mapping of name, critique_request and revision_request.

    A sentence p asks for a critique of how the last response conflicts with p and for a rewrite that follows p. A
    mapping without a name is named by its position.

    Raises:
        ConfigError: with every entry that is neither, is empty, or repeats a name.
    """
    problems: list[Problem] = []
    principles: list[Principle] = []
    if not given:
        raise ConfigError("principles is empty. Give at least one, or leave it out for stagekit's own set.")
    for position, entry in enumerate(given):
        wrong = _wrong_with(entry)
        if wrong:
            problems.append(Problem(f"principles[{position}]", wrong))
            continue
        principle = _pair(entry) if isinstance(entry, str) else _named(entry, position)
        if any(other.name == principle.name for other in principles):
            problems.append(Problem(f"principles[{position}]", f"a second principle named {principle.name!r}"))
        principles.append(principle)
    if problems:
        raise ConfigError(problems)
    return tuple(principles)


def _wrong_with(entry: object) -> str:
    """What is wrong with an entry; empty where nothing is."""
    how = "Give a sentence, or a mapping of name, critique_request and revision_request."
    if isinstance(entry, str):
        return "" if entry.strip() else f"an empty principle. {how}"
    if not isinstance(entry, Mapping):
        return f"{entry!r} is no principle. {how}"
    unknown = sorted(str(key) for key in entry.keys() - _FIELDS)
    if unknown:
        return f"unknown key {unknown[0]!r}. {how}"
    for key in sorted(_FIELDS):
        value = entry.get(key, "1" if key == "name" else "")
        if not isinstance(value, str) or not value.strip():
            return f"{key} is missing or empty. {how}"
    return ""


def _pair(sentence: str) -> Principle:
    text = sentence.strip()
    return Principle(
        name=text,
        critique_request=f"Point out how your last response conflicts with this principle: «{text}»",
        revision_request=f"Rewrite your last response so that it follows the principle: «{text}». "
        "Reply with the rewritten response only.",
    )


def _named(entry: Mapping[str, Any], position: int) -> Principle:
    name = entry.get("name", f"principle-{position + 1}")
    return Principle(name.strip(), entry["critique_request"].strip(), entry["revision_request"].strip())


def _shipped() -> Mapping[str, Any]:
    text = (files("stagekit") / "principles.json").read_text(encoding="utf-8")
    content: Mapping[str, Any] = json.loads(text)
    return content


DEFAULT_PRINCIPLES: tuple[Principle, ...] = principles_from(_shipped()["principles"])
"""Helpful, harmless, honest: stagekit's own set, in words of our own."""

DEFAULT_COMPARISONS: tuple[str, ...] = tuple(_shipped()["comparison_principles"])
"""Questions that decide between two responses, for AI feedback."""
