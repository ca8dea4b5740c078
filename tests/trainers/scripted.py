"""Scripted models and small prompts for the tests of critique-revision."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stagekit.journal import Journal
from stagekit.requests import Completion, Message, ScriptedGenerator
from stagekit.trainers.constitutional import Principle, Prompt, Revisions, drops, plan_digest, revise


PAIR = Principle("kind", "Critique it.", "Revise it.")
Conversation = tuple[Message, ...]
Reply = Callable[[Conversation], str | Completion]


def chat(*turns: str) -> Conversation:
    return tuple({"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns))


def ask(*texts: str, revised: bool = True, source: str = "red") -> list[Prompt]:
    return [Prompt(chat(text), source, revised) for text in texts]


def contents(messages: Conversation) -> tuple[str, ...]:
    return tuple(message["content"] for message in messages)


def role_of(messages: Conversation) -> str:
    return {PAIR.critique_request: "critique", PAIR.revision_request: "revision"}.get(
        messages[-1]["content"], "answer"
    )


def echo(messages: Conversation) -> str:
    """A reply that names its role and the whole conversation."""
    text = json.dumps([message["content"] for message in messages])
    return f"{role_of(messages)} {hashlib.sha256(text.encode()).hexdigest()[:6]}"


def by_role(**replies: str | Completion | Sequence[str | Completion]) -> Reply:
    """Replies by role; a list is used up in turn, its last entry for ever."""
    counts: Counter[str] = Counter()

    def reply(messages: Conversation) -> str | Completion:
        role = role_of(messages)
        given = replies.get(role, echo(messages))
        if isinstance(given, str | Completion):
            return given
        counts[role] += 1
        return given[min(counts[role], len(given)) - 1]

    return reply


def cut(text: str) -> Completion:
    return Completion(text, (1, 2), "length", 5)


def failed() -> Completion:
    return Completion("", (), "error", 5)


def run(
    tmp_path: Path, prompts: Sequence[Prompt], reply: Reply = echo, name: str = "journal.jsonl", **settings: Any
) -> Revisions:
    """Revise with one principle, one scripted policy, and a journal below `tmp_path`."""
    policy = settings.pop("policy", None) or ScriptedGenerator(reply)
    plan: dict[str, Any] = {"policy": policy, "principles": (PAIR,), "rounds": 1, "seed": 7, **settings}
    callbacks = {key: plan.pop(key) for key in ("on_batch", "should_stop") if key in plan}
    with Journal.open(tmp_path / name, plan_digest(prompts, **plan)) as journal:
        return revise(prompts, journal=journal, **plan, **callbacks)


def records_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line["record"] for line in lines if line["type"] == "record"]


def identity_holds(revisions: Revisions) -> None:
    """Prompts in = rows out + drops, for both targets and for pairs (algorithms.md 1.5, test 6)."""
    revised = [trace for trace in revisions.traces if trace.prompt.revise]
    rows = {
        "all": sum(done.drop is None for trace in revised for done in trace.rounds),
        "final": sum(any(done.drop is None for done in trace.rounds) for trace in revised),
    }
    assert len(revised) * revisions.rounds == rows["all"] + drops(revisions)["sft"].total()
    assert len(revised) == rows["final"] + drops(revisions, "final")["sft"].total()
