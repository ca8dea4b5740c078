"""Stages that train several times, each time on data made with the model of the time before.

The last iteration works in the stage's own folder, the ones before it in `iteration-N` there. What is done stays done:
`outcome.json` in an iteration's folder says from which model it started and how it ended.
"""

import dataclasses
import gc
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stagekit import ranks
from stagekit.errors import Interrupted, StageError
from stagekit.files import write_text
from stagekit.job import Job, ModelInput, Outcome
from stagekit.rows import json_object, read_jsonl


logger = logging.getLogger(__name__)

START = "start.json"
"""Says in an iteration's folder which model it started from."""

Prepare = Callable[[Job, int], Job]
"""Gives the job of an iteration, by its number from 1, its training data."""

Measure = Callable[[Job, Outcome], Outcome]
"""Adds to the outcome of an iteration what the type knows of it."""


def run_iterations(job: Job, count: int, prepare: Prepare, measure: Measure | None = None) -> Outcome:
    """Make data and train, `count` times.

    The metrics of iteration N stand under `iteration_N/`, those of the last one also by themselves; steps and dropped
    rows are those of all iterations. `max_duration` counts over all of them.

    Raises:
        Interrupted: the user asked to stop; finished iterations are kept.
    """
    if job.model is None:
        raise StageError(f"stage {job.stage.name!r} has no model to start from")
    job.folder.mkdir(parents=True, exist_ok=True)
    done: list[Outcome] = []
    model = job.model
    for number in range(1, count + 1):
        last = number == count
        folder = job.folder if last else job.folder / f"iteration-{number}"
        outcome = None if last else ranks.once(partial(_finished, folder, model))
        if outcome is None:
            if count > 1:
                job.show.line(f"  iteration {number} of {count}")
            outcome = _iterate(dataclasses.replace(job, folder=folder, model=model), number, prepare, measure)
            if not last and not outcome.stopped:
                ranks.once(partial(_keep, folder, outcome))
        done.append(outcome)
        if outcome.stopped:
            return _together(job, folder, done)
        if not last:
            model = _trained(folder)
    return _together(job, job.folder, done)


def margin_of(job: Job, outcome: Outcome, beta: float, *, change: str, fell: str) -> Outcome:
    """The outcome with what DPO's loss logged at the last step of the iteration: `rewards/margins` as `margin`, and
    how the chosen answers' log-probability changed from the reference, in nats.

    Args:
        beta: Of the loss.
        change: The name of the change.
        fell: What to warn of where they became less likely.
    """
    path = job.folder / "metrics.jsonl"
    logged = [line for line in read_jsonl(path) if "rewards/margins" in line] if path.is_file() else []
    if not logged:
        return outcome
    nats = float(logged[-1]["rewards/chosen"]) / beta
    if nats < 0:
        logger.warning("stage %r: %s (by %.3g nats each)", job.stage.name, fell, -nats)
    found = {"margin": float(logged[-1]["rewards/margins"]), change: nats}
    return dataclasses.replace(outcome, metrics={**outcome.metrics, **found})


def _iterate(job: Job, number: int, prepare: Prepare, measure: Measure | None) -> Outcome:
    from stagekit.training import train

    job.folder.mkdir(exist_ok=True)
    prepared = prepare(job, number)
    if ranks.largest(job.stop()):
        raise Interrupted(f"stage {job.stage.name!r} stopped before training in iteration {number}")
    outcome = train(prepared)
    gc.collect()
    datasets = {name: path.name for name, path in prepared.datasets.items()}
    outcome = measure(prepared, outcome) if measure is not None else outcome
    return dataclasses.replace(
        outcome,
        artifacts={**outcome.artifacts, **({"datasets": datasets} if datasets else {})},
        metrics={**prepared.metrics, **outcome.metrics},
        dropped=_sum(prepared.dropped, outcome.dropped),
    )


def _finished(folder: Path, model: ModelInput) -> Outcome | None:
    """How an iteration ended that was done before, from this very model; else None, with its leavings gone where they
    are another model's."""
    from stagekit.fingerprints import model_fingerprint

    marker = folder / START
    start = model_fingerprint(model.generates)
    if not marker.is_file() or json_object(marker).get("model") != start:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(marker, json.dumps({"model": start}) + "\n")
    ended = folder / "outcome.json"
    return Outcome(**json_object(ended)) if ended.is_file() else None


def _keep(folder: Path, outcome: Outcome) -> None:
    """Mark an iteration as done; its checkpoints are no longer needed."""
    write_text(folder / "outcome.json", json.dumps(dataclasses.asdict(outcome), indent=2) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _trained(folder: Path) -> ModelInput:
    """What an iteration ended with, as the next one starts from it: its adapter is trained on."""
    from stagekit.models import adapter_base

    policy = str((folder / "policy").resolve())
    base = adapter_base(policy)
    return ModelInput(policy) if base is None else ModelInput(base, adapter=policy)


def _together(job: Job, folder: Path, done: list[Outcome]) -> Outcome:
    """One outcome of all iterations; the artifacts are the last one's, named from the run's folder."""
    last = done[-1]
    artifacts: dict[str, Any] = {}
    for name, value in last.artifacts.items():
        if name == "datasets":
            place = folder.relative_to(job.folder.parent) / "data"
            artifacts[name] = {dataset: str(place / file) for dataset, file in value.items()}
        else:
            artifacts[name] = str(folder.relative_to(job.folder.parent) / Path(value).name)
    metrics = dict(last.metrics)
    if len(done) > 1:
        for number, outcome in enumerate(done, start=1):
            metrics.update({f"iteration_{number}/{name}": value for name, value in outcome.metrics.items()})
    return Outcome(
        artifacts=artifacts,
        metrics=metrics,
        steps=sum(outcome.steps for outcome in done),
        samples_trained=sum(outcome.samples_trained for outcome in done),
        dropped=_sum(*(outcome.dropped for outcome in done)),
        stopped=last.stopped,
    )


def _sum(*counts: Mapping[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for count in counts for name in count)
    return {name: sum(count.get(name, 0) for count in counts) for name in names}
