"""The rejection sampling stage: sample and score with the job's model, keep the best, write the datasets."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stagekit import trl_rewards
from stagekit.custom import resolve
from stagekit.errors import StageError
from stagekit.generating import free_memory, generator_for, note_prompts, open_journal, progress, write_datasets
from stagekit.groups import Generation, RewardSource, is_function
from stagekit.iterations import run_iterations
from stagekit.job import Job, Outcome
from stagekit.rewards import function_of
from stagekit.scorers import FunctionScorer, ModelScorer, Scorer, WeightedScorer, free, scorer_from


if TYPE_CHECKING:
    from stagekit.adapters.rejection_sampling import RejectionSampling
    from stagekit.selection import Group, Selection


logger = logging.getLogger(__name__)

FEW = 0.2
"""Share of the valid answers below which a threshold on a reward model's score deserves a word."""


def run(job: Job, method: "RejectionSampling") -> Outcome:
    """Sample, score, select, train; `rounds` times."""
    return run_iterations(job, method.rounds, lambda own, number: _prepare(own, number, method))


def measure(job: Job, method: "RejectionSampling") -> Outcome:
    """Best-of-n on the validation data: metrics and datasets; nothing is learnt."""
    from stagekit import selection

    groups, selections = _sampled(job, 1, method, job.eval_dataset, "validation_data")
    rows = selection.selected_rows(groups, selections)
    files = _write(job, groups, selections, rows)
    _say(job, method, groups, selections, rows)
    place = job.folder.relative_to(job.folder.parent) / "data"
    return Outcome(
        artifacts={"datasets": {name: str(place / file.name) for name, file in files.items()}},
        metrics=selection.metrics(selections),
        dropped=selection.drops(groups, selections),
    )


def scorer_for(job: Job, rewards: Sequence[RewardSource], where: str) -> Scorer:
    """The scorer of a stage's rewards; `stage:NAME` is the reward model of an earlier stage.

    Raises:
        StageError: that stage left none.
    """
    parts = tuple((_scorer(job, one, where), one.weight) for one in rewards)
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else WeightedScorer(parts)


def _scorer(job: Job, reward: RewardSource, where: str) -> Scorer:
    source = reward.source
    if is_function(source):
        if isinstance(source, str) and source.startswith(f"{trl_rewards.MODULE}:"):
            return FunctionScorer(function_of(reward, resolve(source)))
        return FunctionScorer(resolve(source), reward.options)
    if not isinstance(source, str) or not source.startswith("stage:"):
        return scorer_from(source)
    path = job.results[source.removeprefix("stage:")].reward_model
    if path is None:
        raise StageError(f"stage {job.stage.name!r}: {where}: {source!r} left no reward model")
    return ModelScorer(path)


def _prepare(job: Job, number: int, method: "RejectionSampling") -> Job:
    """The job with the kept answers as its training data."""
    from datasets import Dataset

    from stagekit import selection

    groups, selections = _sampled(job, number, method, job.train_dataset, "training_data")
    rows = selection.sft_rows(groups, selections)
    files = _write(job, groups, selections, rows)
    _say(job, method, groups, selections, rows)
    keep = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return dataclasses.replace(
        job,
        train_dataset=Dataset.from_list(keep),
        datasets=files,
        metrics=selection.metrics(selections),
        dropped=selection.drops(groups, selections),
    )


def _sampled(
    job: Job, number: int, method: "RejectionSampling", rows: Any, where: str
) -> tuple[list["Group"], list["Selection"]]:
    """The answers with their rewards, from the journals as far as they are there."""
    from stagekit import selection
    from stagekit.trainers import sampling

    prompts = sampling.prompts_from(rows, f"{job.stage.path}.{where}")
    note_prompts(job, (prompt.messages for prompt in prompts))
    generation = job.stage.generation or Generation()
    scorer = scorer_for(job, method.reward, f"{job.stage.path}.method.reward")
    plan: dict[str, Any] = {
        "policy": generator_for(job, job.model.generates if job.model else None, generation),
        "n": method.n,
        "seed": job.stage.random_seed,
        "max_new_tokens": generation.max_new_tokens,
        "batch_tokens": generation.batch_tokens,
        "iteration": number,
    }
    titles = progress(job, lambda done: "rewards" if done.role == "reward" else "answers")
    texts = sampling.texts_digest(prompts, **plan)
    with open_journal(job, texts, {"policy": plan["policy"].fingerprint}) as journal:
        groups = sampling.sample(prompts, **plan, journal=journal, on_batch=titles, should_stop=job.stop)
    plan.clear()
    free_memory()
    digest = sampling.scores_digest(prompts, texts, scorer)
    with open_journal(job, digest, {"scorer": scorer.fingerprint}, "scores.jsonl") as journal:
        groups = sampling.score(groups, prompts, scorer=scorer, journal=journal, on_batch=titles, should_stop=job.stop)
    free(scorer)
    free_memory()
    chosen = [selection.select(one.candidates, top_k=method.top_k, min_reward=method.min_reward) for one in groups]
    return groups, chosen


def _write(job: Job, groups: Any, selections: Any, rows: Any) -> dict[str, Any]:
    from stagekit import selection

    pairs = selection.preference_rows(groups, selections)
    return write_datasets(job, {"selected": rows, "preferences": pairs, "scored": selection.scored_rows(groups)})


def _say(job: Job, method: "RejectionSampling", groups: Any, selections: Any, rows: Any) -> None:
    """What came of it, in a line; a few examples; and a word where a threshold leaves little."""
    from stagekit import selection

    dropped = selection.drops(groups, selections)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    found = selection.metrics(selections)
    job.show.line(f"  {len(groups)} prompts gave {len(rows)} rows; dropped: {reasons}")
    means = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if name.startswith("reward/"))
    if means:
        job.show.line(f"  rewards: {means}")
    for number, row in enumerate(rows[:3], start=1):
        asked, answer = row["prompt"][-1]["content"], row["completion"][0]["content"]
        job.show.sample(f"  sample {number}", {"prompt": asked, f"answer ({row['reward']:.4g})": answer})
    scores = any(not is_function(one.source) for one in method.reward)
    if scores and method.min_reward is not None and found.get("kept_share", 1.0) < FEW:
        logger.warning(
            "stage %r keeps %.0f %% of its valid answers: method.min_reward is %s, but the zero of a reward model's "
            "score means nothing unless it was trained with center_rewards. Set method.min_reward: null to keep the "
            "best of every prompt.",
            job.stage.name,
            100 * found["kept_share"],
            method.min_reward,
        )
