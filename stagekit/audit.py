"""What a generating stage wrote, text by text, from its journals: no model is needed, and nothing is changed."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stagekit.counters import digest_of
from stagekit.journal import Journal, Record
from stagekit.rows import read_jsonl


ORDER = ("initial", "answer", "critique", "revision", "thought", "judgement")
"""Roles in the order in which a prompt's texts are written."""

JOURNALS = ("journal.jsonl", "judgements.jsonl")
"""Where texts are, and what a judge said of them."""


def texts(folder: Path) -> Iterator[dict[str, Any]]:
    """Every text in the journals of a stage's folder, those of its iterations first: `iteration` (empty for the
    stage's own), `prompt` (None where no row was made of it), `role`, `round`, `principle`, `sample`, `text`,
    `finish_reason`, `tokens`, `reward` (of a text that stands several times, at the first), `key`. Of a judge's words
    also what it was asked, `request`, and where it chose one of two the `probability` of the first."""
    for place in places(folder):
        prompts = _prompts(place)
        rewards = _rewards(place)
        for record in sorted(_records(place), key=_order):
            yield {
                "iteration": "" if place == folder else place.name,
                "prompt": prompts.get(record["prompt_id"]),
                "role": record["role"],
                "round": record["round"],
                "principle": record.get("principle"),
                "sample": record.get("sample"),
                "text": record["text"],
                "finish_reason": record["finish_reason"],
                "tokens": record["n_new"],
                "reward": rewards.get(record["key"]),
                "request": record.get("request") if record["role"] in ("thought", "judgement") else None,
                "probability": record.get("probability"),
                "key": record["key"],
            }


def samples(folder: Path, count: int) -> list[dict[str, Any]]:
    """All texts of `count` prompts, spread over the stage's own journal; fewer where there are fewer."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for text in texts(folder):
        if not text["iteration"] and text["prompt"] is not None:
            found[text["prompt"]].append(text)
    names = sorted(found)
    picked = [names[place * len(names) // count] for place in range(count)] if len(names) > count else names
    return [text for name in picked for text in found[name]]


def principles(folder: Path) -> dict[str, dict[str, float]]:
    """What each principle did. Of a constitution: `revisions` asked for by it, and the share `changed` of them that
    say something else than the answer they revise. Of AI feedback: `labels` asked for by it, the share `decided` of
    them that are preferences, and the share `right` where it is known which response is better."""
    if (folder / "data" / "labels.jsonl").is_file():
        from stagekit.trainers.feedback import by_principle

        return by_principle(read_jsonl(folder / "data" / "labels.jsonl"))
    if not (folder / "journal.jsonl").is_file():
        return {}
    records = list(Journal.read(folder / "journal.jsonl"))
    said = {(one["prompt_id"], one["round"]): one["text"].strip() for one in records if one["role"] != "critique"}
    counts: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        if record["role"] == "revision":
            before = said.get((record["prompt_id"], record["round"] - 1))
            counts[record["principle"]].append(record["text"].strip() != before)
    return {name: {"revisions": len(found), "changed": sum(found) / len(found)} for name, found in counts.items()}


def places(folder: Path) -> list[Path]:
    """The folders with a journal: those of the iterations in their order, then the stage's own."""
    iterations = sorted(folder.glob("iteration-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [place for place in (*iterations, folder) if any((place / name).is_file() for name in JOURNALS)]


def _records(place: Path) -> Iterator[Record]:
    for name in JOURNALS:
        if (place / name).is_file():
            yield from Journal.read(place / name)


def _order(record: Record) -> tuple[Any, ...]:
    role = record["role"]
    return record["prompt_id"], record["round"], ORDER.index(role) if role in ORDER else len(ORDER), record["key"]


def _prompts(folder: Path) -> dict[str, str]:
    """Prompt id -> the prompt as it is shown, from the datasets that were made."""
    found: dict[str, str] = {}
    for path in sorted((folder / "data").glob("*.jsonl")):
        for row in read_jsonl(path):
            messages = row.get("prompt")
            if isinstance(messages, list):
                found[digest_of(messages)] = _shown(messages)
    return found


def _shown(messages: list[Mapping[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _rewards(folder: Path) -> dict[str, float | None]:
    path, scored = folder / "scores.jsonl", folder / "data" / "scored.jsonl"
    if path.is_file():
        return {record["key"]: record["reward"] for record in Journal.read(path)}
    rows = read_jsonl(scored) if scored.is_file() else []
    return {key: reward for row in rows for key, reward in zip(row["keys"], row["rewards"], strict=True)}
