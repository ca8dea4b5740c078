"""The self-rewarding stage: the job's model answers, judges, and learns to prefer its best answers, over and over."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stagekit import ranks
from stagekit.errors import Interrupted
from stagekit.feedback import asking_of, warn_of_judge
from stagekit.generating import free_memory, generator_for, note_prompts, open_journal, progress, write_datasets
from stagekit.groups import Generation
from stagekit.iterations import margin_of, run_iterations
from stagekit.job import Job, Outcome
from stagekit.judging import chooser_of, is_engine, judge_generator, open_judgements
from stagekit.requests import Generator


if TYPE_CHECKING:
    from stagekit.adapters.self_rewarding import SelfRewarding
    from stagekit.selection import Group


logger = logging.getLogger(__name__)

_FELL = (
    "the answers that the judge likes best became less likely too in this iteration: the model moves away from all it "
    "said. Lower learning_rate or epochs, or raise method.beta"
)

MANY_TRUNCATED = 0.3
"""Share of cut answers above which the model learns from its short answers only."""

_TITLES = {"answer": "answers", "judgement": "judgements"}


def run(job: Job, method: "SelfRewarding") -> Outcome:
    """Answer, judge and prefer, `iterations` times."""
    return run_iterations(
        job,
        method.iterations,
        lambda own, number: _prepare(own, number, method),
        lambda own, outcome: margin_of(own, outcome, method.beta, change="chosen_logps_change", fell=_FELL),
    )


def _prepare(own: Job, number: int, method: "SelfRewarding") -> Job:
    """The job of an iteration with the pairs as its training data, and what its judge is worth among its metrics."""
    from datasets import Dataset

    from stagekit.selection import scored_rows
    from stagekit.trainers import self_rewarding

    groups, writes = _answered(own, number, method)
    if ranks.largest(own.stop()):
        raise Interrupted(f"stage {own.stage.name!r} stopped before the judgements of iteration {number}")
    judge = _Judge(own, method, number, writes)
    writes = None
    found = dict[str, float]()
    if own.eval_dataset is not None:
        held_out = self_rewarding.held_out_groups(own.eval_dataset, f"{own.stage.path}.validation_data")
        found = self_rewarding.accuracy(judge.rated(held_out, "validation.jsonl"))
    groups = judge.rated(groups, "judgements.jsonl")
    del judge
    free_memory()
    rows = self_rewarding.pairs(groups, method.margin)
    files = write_datasets(own, {"preferences": rows, "scored": scored_rows(groups)})
    found.update(self_rewarding.metrics(groups, method.margin))
    dropped = self_rewarding.drops(groups, method.margin)
    _say(own, rows, groups, found, dropped)
    return dataclasses.replace(
        own,
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]),
        datasets=files,
        metrics=found,
        dropped=dropped,
    )


def _answered(own: Job, number: int, method: "SelfRewarding") -> tuple[list["Group"], Generator | None]:
    """The answers, and the model that wrote them where it judges too."""
    from stagekit.trainers import sampling

    prompts = sampling.prompts_from(own.train_dataset, f"{own.stage.path}.training_data")
    note_prompts(own, (prompt.messages for prompt in prompts))
    generation = own.stage.generation or Generation()
    policy = generator_for(own, own.model.generates if own.model else None, generation)
    plan: dict[str, Any] = {
        "policy": policy,
        "n": method.n,
        "seed": own.stage.random_seed,
        "max_new_tokens": generation.max_new_tokens,
        "batch_tokens": generation.batch_tokens,
        "iteration": number,
    }
    shown = progress(own, lambda done: _TITLES[done.role])
    digest, info = sampling.texts_digest(prompts, **plan), {"policy": policy.fingerprint}
    with open_journal(own, digest, info) as journal:
        groups = sampling.sample(
            prompts, **plan, journal=journal, stage="self_rewarding", on_batch=shown, should_stop=own.stop
        )
    keeps = method.judge is None and not (method.judge_by == "comparison" and is_engine(generation))
    return groups, policy if keeps else None


class _Judge:
    """Who judges in an iteration, loaded once."""

    def __init__(self, own: Job, method: "SelfRewarding", number: int, policy: Generator | None) -> None:
        self._own, self._method, self._number = own, method, number
        self._generation = own.stage.generation or Generation()
        free_memory()
        self._writes = judge_generator(own, method.judge, self._generation, policy)

    def rated(self, groups: Sequence["Group"], name: str) -> list["Group"]:
        """The groups with the scores of their answers, from the journal `name` as far as they are there."""
        from stagekit.trainers import comparisons, self_rewarding

        own, method = self._own, self._method
        note_prompts(own, (group.messages for group in groups))
        plan: dict[str, Any] = {"seed": own.stage.random_seed, "batch_tokens": self._generation.batch_tokens}
        how: dict[str, Any] = {
            "iteration": self._number,
            "on_batch": progress(own, lambda done: _TITLES[done.role]),
            "should_stop": own.stop,
        }
        if method.judge_by == "comparison":
            judge = chooser_of(method.judge, self._writes)
            plan |= {"judge": judge, "asking": asking_of(method.principles, method.comparison, method.choices)}
            digest = comparisons.verdicts_digest(self_rewarding.compared_pairs(groups), **plan)
            with open_judgements(own, digest, judge, name) as journal:
                return self_rewarding.rate_by_comparison(groups, **plan, **how, journal=journal)
        assert self._writes is not None
        scoring = self_rewarding.Scoring(
            **({"template": method.scoring} if method.scoring is not None else {}),
            max_score=method.max_score,
            judgements=method.judgements,
            max_new_tokens=method.max_judgement_tokens,
        )
        plan |= {"judge": self._writes, "scoring": scoring}
        with open_judgements(own, self_rewarding.rate_digest(groups, **plan), self._writes, name) as journal:
            return self_rewarding.rate(groups, **plan, **how, journal=journal)


def _say(
    job: Job, rows: Sequence[Any], groups: Sequence["Group"], found: dict[str, float], dropped: dict[str, int]
) -> None:
    """What came of an iteration's answers, and where a guard rail is near."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    job.show.line(f"  {len(groups)} prompts gave {len(rows)} pairs; dropped: {reasons}")
    job.show.line("  " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    for number, row in enumerate(rows[:3], start=1):
        parts = {
            "prompt": row["prompt"][-1]["content"],
            f"chosen ({row['chosen_score']:.3g})": row["chosen"][0]["content"],
            f"rejected ({row['rejected_score']:.3g})": row["rejected"][0]["content"],
        }
        job.show.sample(f"  sample {number}", parts)
    answers = sum(len(group.candidates) for group in groups)
    truncated = dropped.get("answers.truncated", 0) / max(answers, 1)
    if truncated > MANY_TRUNCATED:
        logger.warning(
            "stage %r: %.0f %% of the answers were cut and are in no pair, so that the model learns from its short "
            "answers only; raise generation.max_new_tokens.",
            job.stage.name,
            100 * truncated,
        )
    warn_of_judge(job.stage.name, found)
