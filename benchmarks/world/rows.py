"""Training rows of a world, in TRL's conversational forms, and their JSON lines."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.world.families import Question, flawed, good, score, solution
from benchmarks.world.world import TRAINED, Split, World


Row = dict[str, Any]


def answer(text: str) -> list[dict[str, str]]:
    """An answer as a conversation's last turn."""
    return [{"role": "assistant", "content": text}]


def chosen_places(n: int, share: float, rng: Random) -> frozenset[int]:
    """Exactly `round(share * n)` of n places."""
    return frozenset(rng.sample(range(n), round(share * n)))


def demonstrations(
    world: World, n: int, flaws: float = 0.0, families: Sequence[str] = TRAINED, split: Split = "train"
) -> list[Row]:
    """`prompt`, `completion`; exactly the share `flaws` of the completions is flawed."""
    questions = world.mixed(split, n, families, "demonstrations")
    rng = world.rng("demonstrations", n, *families)
    bad = chosen_places(n, flaws, rng)
    return [
        {"prompt": one.prompt, "completion": answer((flawed if place in bad else good)(one, rng))}
        for place, one in enumerate(questions)
    ]


def preferences(
    world: World, n: int, noise: float = 0.0, families: Sequence[str] = TRAINED, split: Split = "train"
) -> list[Row]:
    """`prompt`, `chosen`, `rejected`; exactly the share `noise` of the pairs is the wrong way round.

    The pairs are the same for every noise rate; only the order within them differs.
    """
    questions = world.mixed(split, n, families, "preferences")
    rng = world.rng("preferences", n, *families)
    pairs = [(good(one, rng), flawed(one, rng)) for one in questions]
    turned = chosen_places(n, noise, world.rng("noise", n, *families))
    return [
        {
            "prompt": one.prompt,
            "chosen": answer(worse if place in turned else better),
            "rejected": answer(better if place in turned else worse),
        }
        for place, (one, (better, worse)) in enumerate(zip(questions, pairs, strict=True))
    ]


def candidates(
    world: World, n: int, each: int = 4, families: Sequence[str] = TRAINED, split: Split = "train"
) -> list[Row]:
    """`prompt`, `completions` (at least one good, one flawed), their `scores`, and their `ranks` (1 is best)."""
    questions = world.mixed(split, n, families, "candidates")
    rng = world.rng("candidates", n, each, *families)
    rows = []
    for one in questions:
        texts = [good(one, rng), flawed(one, rng)]
        texts += [(good if rng.random() < 0.5 else flawed)(one, rng) for _ in range(each - 2)]
        rng.shuffle(texts)
        scores = [score(one, text) for text in texts]
        ranks = [1 + sum(other > mine for other in scores) for mine in scores]
        rows.append({"prompt": one.prompt, "completions": texts, "scores": scores, "ranks": ranks})
    return rows


def step_labels(world: World, n: int, flaws: float = 0.5, split: Split = "train") -> list[Row]:
    """`prompt`, `completions` (steps), `labels`: right up to the first wrong step, and wrong from there on."""
    questions = world.questions("steps", split, n, "steps")
    rng = world.rng("steps", n)
    bad = chosen_places(n, flaws, rng)
    rows = []
    for place, one in enumerate(questions):
        count = len(one.item) - 1
        wrong = rng.randrange(count) if place in bad else count
        steps = solution(one.item, wrong, rng.choice((-2, -1, 1, 2)))
        rows.append({"prompt": one.prompt, "completions": steps, "labels": [step < wrong for step in range(count)]})
    return rows


def prompts(world: World, n: int, families: Sequence[str] = TRAINED, split: Split = "train") -> list[Row]:
    """`prompt` alone."""
    return [{"prompt": question.prompt} for question in world.mixed(split, n, families, "prompts")]


def as_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines; equal rows give equal bytes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write rows as JSON lines; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_jsonl(rows), encoding="utf-8")
    return path


def questions_of(kinds: Mapping[str, Sequence[Question]]) -> list[Question]:
    """All questions of a held-out set, kind by kind."""
    return [question for questions in kinds.values() for question in questions]
