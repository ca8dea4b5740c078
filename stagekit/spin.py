"""The self-play stage: the job's model answers its data, and learns to prefer the data's answers, over and over."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stagekit.generating import free_memory, generator_for, note_prompts, open_journal, progress, write_datasets
from stagekit.groups import Generation
from stagekit.iterations import margin_of, run_iterations
from stagekit.job import Job, Outcome
from stagekit.rows import read_jsonl


if TYPE_CHECKING:
    from stagekit.adapters.self_play import SelfPlay


logger = logging.getLogger(__name__)

_FELL = (
    "the data's answers became less likely in this iteration: the model moves away from its own answers, not towards "
    "the data. Lower learning_rate or epochs, or raise method.beta"
)


def run(job: Job, method: "SelfPlay") -> Outcome:
    """Sample and prefer, `iterations` times."""
    return run_iterations(
        job,
        method.iterations,
        lambda own, number: _prepare(own, number, method, job),
        lambda own, outcome: margin_of(own, outcome, method.beta, change="real_logps_change", fell=_FELL),
    )


def _sampled(own: Job, number: int, method: "SelfPlay", data: Any, where: str, journal_name: str) -> tuple[Any, Any]:
    """What the opponent answers to the prompts of `data`, and the answers that stand there."""
    from stagekit.trainers import sampling, self_play

    prompts = sampling.prompts_from(data, where)
    note_prompts(own, (prompt.messages for prompt in prompts))
    answers = self_play.real_answers(data, where)
    generation = (own.stage.generation or Generation()).model_copy(update={"temperature": method.temperature})
    plan: dict[str, Any] = {
        "policy": generator_for(own, own.model.generates if own.model else None, generation),
        "n": method.responses_per_prompt,
        "seed": own.stage.random_seed,
        "max_new_tokens": generation.max_new_tokens,
        "batch_tokens": generation.batch_tokens,
        "iteration": number,
    }
    shown = progress(own, lambda done: f"answers to {where.rpartition('.')[2]}")
    digest, info = sampling.texts_digest(prompts, **plan), {"policy": plan["policy"].fingerprint}
    with open_journal(own, digest, info, journal_name) as journal:
        groups = sampling.sample(
            prompts, **plan, journal=journal, stage="self_play", on_batch=shown, should_stop=own.stop
        )
    plan.clear()
    free_memory()
    return groups, answers


def _prepare(own: Job, number: int, method: "SelfPlay", stage: Job) -> Job:
    """The job of an iteration with the pairs as its training data; validation data are answered and paired too."""
    from stagekit.trainers import self_play

    path = own.stage.path
    groups, answers = _sampled(own, number, method, own.train_dataset, f"{path}.training_data", "journal.jsonl")
    rows = self_play.pairs(groups, answers, number)
    held_out = own.eval_dataset
    if held_out is not None:
        measured = _sampled(own, number, method, held_out, f"{path}.validation_data", "validation.jsonl")
        held_out = _dataset(self_play.pairs(*measured, number))
    files = write_datasets(own, {"pairs": rows})
    before = []
    if method.mix_previous and number > 1:
        before = read_jsonl(stage.folder / f"iteration-{number - 1}" / "data" / "pairs.jsonl")
    found, dropped = self_play.metrics(groups, answers), self_play.drops(groups, answers)
    _say(own, method, len(rows), len(before), found, dropped)
    return dataclasses.replace(
        own,
        train_dataset=_dataset((*rows, *before)),
        eval_dataset=held_out,
        datasets=files,
        metrics=found,
        dropped=dropped,
    )


def _dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The pairs as DPO reads them."""
    from datasets import Dataset

    return Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])


def _say(
    job: Job, method: "SelfPlay", rows: int, before: int, found: dict[str, float], dropped: dict[str, int]
) -> None:
    """What came of the sampling, and where a guard rail is near."""
    from stagekit.trainers import self_play

    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    also = f", and {before} of the iteration before" if before else ""
    job.show.line(f"  {rows} pairs{also}; dropped: {reasons}")
    if found.get("truncated", 0.0) > self_play.MANY_TRUNCATED:
        logger.warning(
            "stage %r: %.0f %% of the opponent's answers were cut and make no pair, so that it plays with its short "
            "answers only; raise generation.max_new_tokens.",
            job.stage.name,
            100 * found["truncated"],
        )
    stage = job.stage
    each = math.ceil(math.ceil((rows + before) / stage.batch_size) / stage.gradient_accumulation_steps)
    steps = stage.max_steps if stage.max_steps > 0 else each * stage.epochs
    if self_play.overtrained(method.beta, stage.resolved_learning_rate(), steps, stage.lora is not None):
        logger.warning(
            "stage %r: learning_rate %g over %d steps may come near the optimum of an iteration, and with beta %g "
            "that lies beyond the data (it multiplies log(p / p_data) by %g). Lower learning_rate or epochs, raise "
            "beta (1 reaches the data in one iteration), or set method.stop_at_margin.",
            stage.name,
            stage.resolved_learning_rate(),
            steps,
            method.beta,
            self_play.contraction(method.beta),
        )
