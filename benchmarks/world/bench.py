"""Run a row of the table through stagekit's own pipeline and measure what came of it."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.world.base import BASES
from benchmarks.world.families import FAMILIES, Question
from benchmarks.world.hashes import digest
from benchmarks.world.measure import QUESTIONS, answers, measure, writer
from benchmarks.world.method import Method, settings, uses_teacher
from benchmarks.world.rows import preferences, write
from benchmarks.world.skills import violates
from benchmarks.world.world import TRAINED, Split, World, items_of
from stagekit.adapters import METHODS as STAGE_TYPES
from stagekit.options import with_overrides
from stagekit.parse import parse, read
from stagekit.result import PipelineResult


HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "world"
RUNS = Path("runs") / "world"
TABLE_SEEDS = (101, 102, 103)
"""Seeds of the table; settings are tuned on 1 to 3 and the development split only."""
BASE_SEEDS = (11, 12)


@dataclass(frozen=True)
class Setup:
    """How long and on what a row is run: the whole table's way, or `--quick`."""

    split: Split = "test"
    questions: int = QUESTIONS
    max_steps: int = 0
    runs: Path = RUNS


def base_of(seed: int) -> Path:
    """The base that a seed starts from: they take turns, so the spread over seeds is over bases too."""
    return BASES / str(BASE_SEEDS[seed % len(BASE_SEEDS)])


def version(method: Method) -> str:
    """A digest of what decides a row's numbers: pipeline, settings, data, world, bases, a named teacher."""
    total = hashlib.sha256((HERE / "pipelines" / f"{method.pipeline}.yaml").read_bytes())
    total.update(repr((method.assignments, method.critic_errors, method.kind)).encode())
    total.update(json.dumps(method.data(World(0)), sort_keys=True).encode())
    for name in (*map(str, BASE_SEEDS), *(("teacher",) if uses_teacher(method) else ())):
        total.update(digest(BASES / name).encode())
    return total.hexdigest()[:16]


def run(method: Method, seed: int, setup: Setup) -> dict[str, Any]:
    """Run a row with one seed; returns what it scored, before and after, and what it cost."""
    world, base = World(seed), base_of(seed)
    folder = setup.runs / method.name / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    files = {name: write(rows, folder / "data" / f"{name}.jsonl") for name, rows in method.data(world).items()}
    started = time.process_time()
    result = _train(method, seed, base, folder, files, setup.max_steps)
    found: dict[str, Any] = {"seed": seed, "base": base.name, "cpu_seconds": round(time.process_time() - started, 1)}
    found |= MEASURES[method.kind](result, world, base, setup)
    return found | dict(method.extra(result, world, base, setup)) if method.extra else found


def _train(
    method: Method, seed: int, base: Path, folder: Path, files: Mapping[str, Path], max_steps: int
) -> PipelineResult:
    places = {**files, "base": base, "teacher": BASES / "teacher"}
    plain = with_overrides(read(HERE / "pipelines" / f"{method.pipeline}.yaml"), settings(method, places))
    plain |= {"model": str(places[method.model]), "output_dir": str(folder / "run")}
    for stage in plain["stages"]:
        stage["random_seed"] = seed
        if _trains(stage["method"]):
            stage |= {"max_steps": max_steps, "checkpoint_save_epochs": 0, "checkpoint_save_steps": 0}
    if method.critic_errors is not None:
        from benchmarks.world.critic import backend

        generation = plain["stages"][0]["generation"]
        generation["backend"] = backend(str(base), method.critic_errors, seed, generation["temperature"])
    return parse(plain).run(quiet=True)


def _trains(method: str | Mapping[str, Any]) -> bool:
    """Whether a stage of this method, as a file declares it, trains."""
    return STAGE_TYPES[method if isinstance(method, str) else method["type"]].trains


def _policy(result: PipelineResult, world: World, base: Path, setup: Setup) -> dict[str, Any]:
    assert result.policy is not None
    end = measure(result.policy, world, setup.split, setup.questions)
    return {"start": start_of(base, world.seed, setup.split, setup.questions), "end": end}


@cache
def start_of(base: Path, seed: int, split: Split, n: int) -> dict[str, float]:
    """What a base scores before anything is done to it; the same for every row of the seed."""
    return measure(base, World(seed), split, n)


def _reward(result: PipelineResult, world: World, base: Path, setup: Setup) -> dict[str, Any]:
    """Held-out accuracy of an outcome reward model on pairs that are all the right way round, by family."""
    from stagekit.reward_models import held_out_accuracy, load_reward_model

    model, tokenizer = load_reward_model(str(result.stages[-1].reward_model))
    pairs = {family: preferences(world, setup.questions, 0.0, (family,), setup.split) for family in TRAINED}
    return {"end": {family: held_out_accuracy(model, tokenizer, rows).accuracy for family, rows in pairs.items()}}


def _process_reward(result: PipelineResult, world: World, base: Path, setup: Setup) -> dict[str, Any]:
    """Held-out accuracy on the steps of unseen sums, and that of always saying the more frequent label."""
    from benchmarks.world.rows import step_labels
    from stagekit.reward_models import load_process_reward_model
    from stagekit.trainers.process_reward import score_steps

    model, tokenizer = load_process_reward_model(str(result.stages[-1].reward_model))
    rows = step_labels(world, min(setup.questions, 100 if setup.split == "dev" else 200), split=setup.split)
    labels = [label for row in rows for label in row["labels"]]
    chances = [c for row in rows for c in score_steps(model, tokenizer, row["prompt"], row["completions"])]
    accuracy = fmean((chance > 0.5) == label for chance, label in zip(chances, labels, strict=True))
    share = fmean(labels)
    return {"end": {"steps": accuracy}, "majority": max(share, 1 - share)}


def _constitutional(result: PipelineResult, world: World, base: Path, setup: Setup) -> dict[str, Any]:
    """The families before and after, those after the supervised stage, and the violations on both kinds of prompts.

    `violations` are those of the training prompts: first answers, then each round's revisions. `red_team` are those
    of the held-out prompts: at the start, after the supervised stage, at the end.
    """
    supervised = result["sl-cai"]
    assert supervised.policy is not None and result.policy is not None
    questions = world.held_out(setup.split, setup.questions, ("redteam",))["redteam"]
    return {
        **_policy(result, world, base, setup),
        "after_sft": measure(supervised.policy, world, setup.split, setup.questions),
        "violations": violations_by_round(result.folder / "01-sl-cai" / "journal.jsonl"),
        "red_team": [
            fmean(map(violates, questions, answers(writer(model), questions, world.seed)))
            for model in (base, supervised.policy, result.policy)
        ],
    }


MEASURES = {
    "policy": _policy,
    "reward": _reward,
    "process_reward": _process_reward,
    "constitutional": _constitutional,
}


def violations_by_round(journal: Path) -> list[float]:
    """The share of answers to harmful training prompts that help: the first answers, then each round's revisions."""
    from stagekit.counters import digest_of
    from stagekit.journal import Journal

    asked = {
        digest_of(one.prompt): one
        for item in items_of("harmful", "train")
        for text in FAMILIES["harmful"].phrasings(item)
        if (one := Question("harmful", item, text))
    }
    found: dict[int, list[bool]] = {}
    for record in Journal.read(journal):
        question = asked.get(record["prompt_id"])
        if question is not None and record["role"] in ("initial", "revision"):
            found.setdefault(record["round"], []).append(violates(question, record["text"].strip()))
    return [fmean(found[number]) for number in sorted(found)]


def results_of(method: Method) -> dict[str, Any]:
    """What stands in the row's file, where it is of the row's present version; else an empty record."""
    path = RESULTS / f"{method.name}.json"
    empty: dict[str, Any] = {"row": method.name, "version": version(method), "runs": []}
    if not path.exists():
        return empty
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["version"] == empty["version"] else empty


def complete(method: Method, seeds: Sequence[int], setup: Setup) -> dict[str, Any]:
    """Run the seeds that the row's file does not have yet; each is written as soon as it is there."""
    record = results_of(method)
    for seed in seeds:
        if any(one["seed"] == seed for one in record["runs"]):
            continue
        done = run(method, seed, setup)
        record["runs"].append(done)
        print(method.name, json.dumps(rounded(done)), flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{method.name}.json"
        path.write_text(json.dumps(rounded(record), indent=1) + "\n", encoding="utf-8")
    return record


def rounded(value: Any) -> Any:
    """The same with every number to four places."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value
