"""Prompts and answers in rows of data, each a text or a conversation, for the trainers that write their own data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stagekit.errors import ConfigError, Problem
from stagekit.requests import Message


NO_ANSWER = "must be a text, or one turn of the assistant"
"""What is wrong with a column of which `answer_in` finds nothing."""


def turns_in(given: Any, role: str = "user") -> tuple[Message, ...]:
    """The turns of a prompt or an answer: a text is one turn of `role`. Nothing gives none."""
    turns = [{"role": role, "content": given}] if isinstance(given, str) else given or ()
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def answer_in(given: Any) -> str | None:
    """An answer's text; None where it is neither a text nor one turn of the assistant."""
    turns = turns_in(given, "assistant")
    return str(turns[0]["content"]) if len(turns) == 1 and turns[0]["role"] == "assistant" else None


def asked_in(rows: Iterable[Mapping[str, Any]], where: str) -> list[tuple[Message, ...]]:
    """The conversations to be answered: the column `prompt` of each row.

    Raises:
        ConfigError: with every row that has no prompt, or one that does not end with the user's turn.
    """
    found = [turns_in(row.get("prompt")) for row in rows]
    problems = [
        Problem(f"{where}: row {place}", wrong) for place, one in enumerate(found) if (wrong := unanswerable(one))
    ]
    if problems:
        raise ConfigError(problems)
    return found


def unanswerable(messages: Sequence[Message]) -> str:
    """What keeps a conversation from being a prompt; an empty string where nothing does."""
    if not messages or not any(message["content"].strip() for message in messages):
        return "the prompt is empty"
    role = messages[-1]["role"]
    if role != "user":
        return f"the prompt ends with a turn of the {role}; it must end with the user's, which the policy answers"
    return ""
