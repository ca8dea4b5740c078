"""What a generating stage wrote, text by text, from its journals: no model is needed, and nothing is changed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stagekit.counters import digest_of
from stagekit.journal import PROMPTS, TEXTS, Journal, Record
from stagekit.rows import read_jsonl


ORDER = ("instruction", "initial", "answer", "critique", "revision", "thought", "judgement")
"""Roles in the order in which a prompt's texts are written."""


def texts(folder: Path) -> Iterator[dict[str, Any]]:
    """Every text in the journals of a stage's folder, those of its iterations first.

    `iteration` (empty for the stage's own), `journal` (which of them, without its ending), `prompt` (None where the
    folder does not say), `role`, `round`, `principle`, `topic`, `sample`, `text`, `finish_reason`, `tokens`, `reward`
    (of a text that stands several times, at the first), `changed` (of a revision: whether it says something else than
    the answer that it revises), `drop` (why an instruction was not answered), `key`. Of a judge's words also what it
    was asked, `request`, and where it chose one of two the `probability` of the first.
    """
    for place in places(folder):
        prompts, rewards, drops = _prompts(place), _rewards(place), _drops(place)
        named = list(_records(place))
        changed = {record["key"]: does for record, does in _revisions(record for _, record in named)}
        for journal, record in sorted(named, key=lambda one: _order(one[1])):
            yield {
                "iteration": "" if place == folder else place.name,
                "journal": journal,
                "prompt": prompts.get(record["prompt_id"]),
                "role": record["role"],
                "round": record["round"],
                "principle": record.get("principle"),
                "topic": record.get("topic"),
                "sample": record.get("sample"),
                "text": record["text"],
                "finish_reason": record["finish_reason"],
                "tokens": record["n_new"],
                "reward": rewards.get(record["key"]),
                "changed": changed.get(record["key"]),
                "drop": drops.get(record["key"]),
                "request": record.get("request") if record["role"] in ("thought", "judgement") else None,
                "probability": record.get("probability"),
                "key": record["key"],
            }


def samples(folder: Path, count: int) -> list[dict[str, Any]]:
    """All texts of `count` prompts of the last iteration that wrote any, fewer where there are fewer; where requests
    for instructions, or prompts of validation data, stand beside the others, of as many of each kind."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    last = places(folder)[-1:]
    iteration = "" if last in ([], [folder]) else last[0].name
    for text in texts(folder):
        if text["iteration"] == iteration and text["prompt"] is not None:
            found[text["prompt"]].append(text)
    kinds: dict[str, list[str]] = {name.partition(".")[0]: [] for name in TEXTS}
    for prompt, written in sorted(found.items()):
        kinds[min((text["journal"] for text in written), key=list(kinds).index)].append(prompt)
    shown = []
    for names in kinds.values():
        picked = [names[place * len(names) // count] for place in range(count)] if len(names) > count else names
        shown += [text for name in picked for text in found[name]]
    return shown


def principles(folder: Path) -> dict[str, dict[str, float]]:
    """What each principle did. Of a constitution: `revisions` asked for by it, and the share `changed` of them that
    say something else than the answer they revise, its hit rate; which ones, `texts` tells. Of AI feedback: `labels`
    asked for by it, the share `decided` of them that are preferences, and the share `right` where it is known which
    response is better."""
    if (folder / "data" / "labels.jsonl").is_file():
        from stagekit.trainers.feedback import by_principle

        return by_principle(read_jsonl(folder / "data" / "labels.jsonl"))
    counts: dict[str, list[bool]] = defaultdict(list)
    for place in places(folder):
        for record, changed in _revisions(record for _, record in _records(place)):
            counts[record["principle"]].append(changed)
    return {name: {"revisions": len(found), "changed": sum(found) / len(found)} for name, found in counts.items()}


def places(folder: Path) -> list[Path]:
    """The folders with a journal: those of the iterations in their order, then the stage's own."""
    iterations = sorted(folder.glob("iteration-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [place for place in (*iterations, folder) if any((place / name).is_file() for name in TEXTS)]


def _records(place: Path) -> Iterator[tuple[str, Record]]:
    """Every record of the journals of texts, with the journal's name."""
    for name in TEXTS:
        if (place / name).is_file():
            yield from ((name.partition(".")[0], record) for record in Journal.read(place / name))


def _revisions(records: Iterable[Record]) -> Iterator[tuple[Record, bool]]:
    """Every revision, and whether it changed the answer. An empty one changes nothing: the answer before it stays."""
    said = {(one["prompt_id"], one["round"]): one for one in records if one["role"] in ("initial", "revision")}
    for (prompt, number), record in said.items():
        if record["role"] != "revision":
            continue
        before = (said.get((prompt, earlier)) for earlier in range(number - 1, -1, -1))
        stood = next((one["text"].strip() for one in before if one is not None and one["text"].strip()), "")
        yield record, record["text"].strip() not in ("", stood)


def _order(record: Record) -> tuple[Any, ...]:
    role = record["role"]
    return record["prompt_id"], record["round"], ORDER.index(role) if role in ORDER else len(ORDER), record["key"]


def _prompts(folder: Path) -> dict[str, str]:
    """Prompt id -> the prompt as it is shown, from what was noted, else from the datasets that were made."""
    found: dict[str, str] = {}
    for path in sorted((folder / "data").glob("*.jsonl")):
        for row in read_jsonl(path):
            messages = row.get("prompt")
            if isinstance(messages, list):
                found[digest_of(messages)] = _shown(messages)
    noted = read_jsonl(folder / PROMPTS) if (folder / PROMPTS).is_file() else []
    return found | {row["id"]: _shown(row["prompt"]) for row in noted}


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


def _drops(folder: Path) -> dict[str, str]:
    """Key of an instruction -> why it was not answered, where it was not."""
    path = folder / "data" / "instructions.jsonl"
    return {row["key"]: row["drop"] for row in read_jsonl(path) if row.get("drop")} if path.is_file() else {}
