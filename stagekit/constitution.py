"""The Constitutional AI stage's data: load who answers and who criticises, run the rounds, write the datasets."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stagekit.errors import StageError
from stagekit.generating import free_memory, generator_for, note_prompts, open_journal, progress, write_datasets
from stagekit.groups import Generation, is_function
from stagekit.job import Job
from stagekit.requests import Generator


if TYPE_CHECKING:
    from stagekit.adapters.constitutional import Constitutional


def prepare(job: Job, method: "Constitutional") -> Job:
    """Answer, criticise, revise; returns the job with the revisions as training data and `preferences` beside them.

    A run that was killed goes on from the journal; texts of other settings are put aside, never mixed in.
    """
    from datasets import Dataset

    from stagekit.trainers import constitutional as cai

    prompts = _prompts(job, method)
    note_prompts(job, (prompt.messages for prompt in prompts))
    principles = _principles(method)
    generation = job.stage.generation or Generation()
    arguments: dict[str, Any] = {
        "policy": generator_for(job, job.model.generates if job.model else None, generation),
        "critic": _critic(job, method, generation),
        "principles": principles,
        "rounds": method.rounds,
        "seed": job.stage.random_seed,
        "max_new_tokens": generation.max_new_tokens,
        "max_critique_tokens": method.max_critique_tokens or generation.max_new_tokens,
        "batch_tokens": generation.batch_tokens,
    }
    digest = cai.plan_digest(prompts, **arguments)
    with open_journal(job, digest, {"policy": arguments["policy"].fingerprint}) as journal:
        revisions = cai.revise(
            prompts, journal=journal, on_batch=_progress(job, method.rounds), should_stop=job.stop, **arguments
        )
    arguments.clear()
    free_memory()
    rows = cai.sft_rows(revisions, method.target)
    pairs = cai.preference_rows(revisions)
    files = write_datasets(job, {"revisions": rows, "preferences": pairs})
    for number, sample in enumerate(cai.samples(revisions, 3), start=1):
        job.show.sample(f"  sample {number}", sample)
    counted = cai.drops(revisions, method.target)
    dropped = {f"{kind}.{reason}": count for kind, reasons in counted.items() for reason, count in reasons.items()}
    metrics = cai.metrics(revisions)
    job.show.line(
        f"  {len(prompts)} prompts gave {len(rows)} rows to learn and {len(pairs)} pairs; dropped: {_said(dropped)}"
    )
    _show_refusals(job, metrics)
    keep = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return dataclasses.replace(
        job, train_dataset=Dataset.from_list(keep), datasets=files, metrics=metrics, dropped=dropped
    )


def _prompts(job: Job, method: "Constitutional") -> list[Any]:
    from stagekit.trainers.constitutional import prompts_from

    rows = job.train_dataset
    if rows is None:
        raise StageError(f"stage {job.stage.name!r} has no prompts")
    prompts = []
    for row in rows:
        source = row.get("source", "prompts")
        prompts += prompts_from([row], source, revise=source not in method.unrevised)
    return prompts


def _principles(method: "Constitutional") -> tuple[Any, ...]:
    from stagekit.principles import DEFAULT_PRINCIPLES, principles_from

    if method.principles is None:
        return tuple(DEFAULT_PRINCIPLES)
    return principles_from([one if isinstance(one, str) else one.model_dump() for one in method.principles])


def _critic(job: Job, method: "Constitutional", generation: Generation) -> Generator | None:
    name = method.critique_model
    if name is None or is_function(generation.backend):
        return None
    generation = generation.model_copy(update={"backend": "transformers"})
    if isinstance(name, str) and name.startswith("stage:"):
        policy = job.results[name.removeprefix("stage:")].policy
        if policy is None:
            raise StageError(f"stage {job.stage.name!r}: critique_model {name!r} left no model")
        return generator_for(job, policy, generation)
    from stagekit.models import local_model

    return generator_for(job, local_model(name, where=f"{job.stage.path}.method.critique_model"), generation)


def _progress(job: Job, rounds: int) -> Any:
    """A progress line per round, and one for the prompts that are only answered."""

    def title(done: Any) -> str:
        if done.role == "initial":
            return "answers that are not revised"
        texts = "answers, critiques, revisions" if done.round == 1 else "critiques, revisions"
        return f"round {done.round} of {rounds}: {texts}"

    return progress(job, title)


def _said(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"


def _show_refusals(job: Job, metrics: Mapping[str, float]) -> None:
    rates = {name: value for name, value in metrics.items() if "refusal" in name}
    if rates:
        job.show.line(
            "  refusals among first answers: " + ", ".join(f"{name} {value:.0%}" for name, value in rates.items())
        )
