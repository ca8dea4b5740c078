"""Stages that write their own data: rejection sampling (RAFT), self-play (SPIN), synthetic data."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.world import rows
from benchmarks.world.families import score
from benchmarks.world.lookup import question_of
from benchmarks.world.measure import answers, nll, scores, write, writer
from benchmarks.world.method import Data, Method, demonstrations
from benchmarks.world.skills import asking_request
from benchmarks.world.world import TRAINED, World
from stagekit.rows import read_jsonl


N = 8
"""Answers to a prompt."""
PROMPTS = 800
SPIN_ROWS = 600
SEEDS = 64
ASKED = 100
"""Questions of each family, and requests, in what is measured besides the scores."""


def best_of_n(result: Any, world: World, base: Path, setup: Any) -> Mapping[str, Any]:
    """What one of the base's answers to a held-out question is worth, what the best of N of them, and what one of the
    trained model's; and how much of the gain from one to the best of N the trained model has in a single answer."""
    held_out = world.held_out(setup.split, min(setup.questions, ASKED), TRAINED)
    asked = [question for questions in held_out.values() for question in questions]
    generator = writer(base)
    draws = [answers(generator, asked, world.seed * 1000 + number) for number in range(N)]
    best = [
        max(texts, key=lambda text, asked=question: score(asked, text))
        for question, texts in zip(asked, zip(*draws, strict=True), strict=True)
    ]
    one = fmean(_mean(held_out, texts) for texts in draws)
    most = _mean(held_out, best)
    trained = _mean(held_out, answers(writer(str(result.policy)), asked, world.seed))
    return {"best_of_n": {"one": one, "best": most, "trained": trained, "recovered": (trained - one) / (most - one)}}


def distances(result: Any, world: World, base: Path, setup: Any) -> Mapping[str, Any]:
    """How far the model is from the data, after the first training and after each iteration of self-play (or after
    the epoch that stands in its place): `wrong`, one less the score of its sampled answers (the data's is 1), and
    `nll`, the nats of a held-out right answer."""
    start, *between = str(result["sft"].policy), *sorted(map(str, result.folder.glob("02-spin/iteration-*/policy")))
    right = rows.demonstrations(world, ASKED * len(TRAINED), 0.0, split=setup.split)
    held_out = world.held_out(setup.split, min(setup.questions, ASKED), TRAINED)
    asked = [question for questions in held_out.values() for question in questions]
    models = [start, *between, str(result.policy)]
    return {
        "wrong": [1 - _mean(held_out, answers(writer(model), asked, world.seed)) for model in models],
        "nll": [nll(model, right) for model in models],
    }


def _mean(held_out: Mapping[str, Any], texts: list[str]) -> float:
    """The mean over families of one answer to each question."""
    return fmean(scores(held_out, texts).values())


def questions(result: Any, world: World, base: Path, setup: Any) -> Mapping[str, Any]:
    """Of the instructions asked for: the share that the stage kept, the share that ask a question of this world
    (`valid`), and both (`valid_unique`). `right`: what the teacher's answers to those are worth. `own`: the share that
    ask a question where the base is asked for them, which never learnt to."""
    folder = result.folder / "01-synthetic" / "data"
    written = read_jsonl(folder / "instructions.jsonl")
    asks = [question_of(line["completion"][0]["content"]) is not None for line in written]
    kept = [not line["drop"] for line in written]
    learnt = [
        score(question, row["completion"][0]["content"])
        for row in read_jsonl(folder / "rows.jsonl")
        if (question := question_of(row["prompt"][0]["content"])) is not None
    ]
    request = [{"role": "user", "content": asking_request()}]
    own = write(writer(base), [request] * ASKED, world.seed)
    return {
        "questions": {
            "kept": fmean(kept),
            "valid": fmean(asks),
            "valid_unique": fmean(map(all, zip(asks, kept, strict=True))),
            "right": fmean(learnt),
            "own": fmean(question_of(text) is not None for text in own),
        }
    }


def _prompts(world: World) -> Data:
    return {"rows": rows.prompts(world, PROMPTS)}


def _seeds(world: World) -> Data:
    return {"rows": rows.prompts(world, SEEDS)}


_BOTH = ("stages.sft.training_data={rows}", "stages.spin.training_data={rows}")

ROWS = (
    Method("raft", "rejection_sampling", "raft", _prompts, (f"stages.raft.method.n={N}",), "raft-random",
           extra=best_of_n),
    Method("raft-random", "rejection_sampling", "raft", _prompts, ("stages.raft.method.n=1",),
           note="learns a single sample of each prompt, a random one of n: what it gains or loses is not from the "
           "choice"),
    Method("spin", "self_play", "spin", demonstrations(0.0, SPIN_ROWS), _BOTH, "spin-sft", extra=distances,
           note="its distance to the data falls in every iteration, and one more epoch of SFT does as much"),
    Method("spin-sft", "self_play", "spin_sft", demonstrations(0.0, SPIN_ROWS), _BOTH, extra=distances,
           note="the start of self-play, trained for one more epoch instead"),
    Method("synthetic", "synthetic_data", "synthetic", _seeds,
           ("stages.synthetic.training_data={rows}", "stages.synthetic.method.teacher={teacher}"), "raft-random",
           extra=questions),
)  # fmt: skip
