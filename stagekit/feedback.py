"""The AI feedback stage: two responses to every prompt, a judge's probabilities, and the datasets of them."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stagekit import ranks
from stagekit.choices import Chooser
from stagekit.errors import Interrupted
from stagekit.generating import free_memory, generator_for, note_prompts, open_journal, progress, write_datasets
from stagekit.groups import Generation
from stagekit.job import Job, Outcome
from stagekit.judging import chooser_of, is_engine, judge_generator, open_judgements
from stagekit.requests import Generator


if TYPE_CHECKING:
    from stagekit.adapters.ai_feedback import AIFeedback
    from stagekit.trainers.comparisons import Asking
    from stagekit.trainers.feedback import Label, Responses


logger = logging.getLogger(__name__)

UNHEARD = 0.5
"""Probability of one of the two choices below which the judge mostly says something else."""

_TITLES = {"answer": "responses", "thought": "reasons", "judgement": "judgements"}


def run(job: Job, method: "AIFeedback") -> Outcome:
    """Sample or read the pairs, judge them, write `preferences` and `labels`; the model is passed on as it came."""
    from stagekit.trainers import feedback

    job.folder.mkdir(parents=True, exist_ok=True)
    generation = job.stage.generation or Generation()
    responses, policy = _responses(job, method, generation)
    if ranks.largest(job.stop()):
        raise Interrupted(f"stage {job.stage.name!r} stopped before the judgements")
    if method.judge is not None or is_engine(generation):
        policy = None
        free_memory()
    thinker = judge_generator(job, method.judge, generation, policy)
    policy = None
    judge = chooser_of(method.judge, thinker)
    asked = (job, method, judge, thinker, generation)
    found = dict[str, float]()
    if job.eval_dataset is not None:
        held_out = feedback.responses_from(
            job.eval_dataset, feedback.KNOWN_BY_NAME, None, f"{job.stage.path}.validation_data"
        )
        measured = feedback.metrics(_labels(*asked, held_out, "validation.jsonl"))
        found = {f"held_out/{name}": value for name, value in measured.items()}
    made = _labels(*asked, responses, "judgements.jsonl")
    found.update(feedback.metrics(made))
    del thinker, judge, asked
    free_memory()
    rows = feedback.preference_rows(made)
    files = write_datasets(job, {"preferences": rows, "labels": feedback.label_rows(made)})
    _say(job, made, rows, found)
    place = job.folder.relative_to(job.folder.parent) / "data"
    return Outcome(
        artifacts={"datasets": {name: str(place / file.name) for name, file in files.items()}},
        metrics=found,
        dropped=feedback.drops(made),
    )


def asking_of(
    principles: Sequence[str] | None,
    template: str | None,
    choices: tuple[str, str] = ("A", "B"),
    reasons: bool = False,
    max_thought_tokens: int = 256,
) -> "Asking":
    """How a judge is asked, with stagekit's own words where the user has none."""
    from stagekit.principles import DEFAULT_COMPARISONS
    from stagekit.templates import COMPARISON, REASONED_COMPARISON, VERDICT
    from stagekit.trainers.comparisons import Asking

    verdict = VERDICT.replace("A or B", " or ".join(choices))
    own = (REASONED_COMPARISON if reasons else COMPARISON).replace("A or B", " or ".join(choices))
    named = tuple(principles) if principles is not None else DEFAULT_COMPARISONS
    return Asking(named, template or own, choices, reasons, verdict, max_thought_tokens)


def _responses(job: Job, method: "AIFeedback", generation: Generation) -> tuple[list["Responses"], Generator | None]:
    """The pairs, and the policy where it wrote them."""
    from stagekit.trainers import feedback, sampling

    where = f"{job.stage.path}.training_data"
    if method.responses is not None:
        return feedback.responses_from(job.train_dataset, method.responses, method.truth, where), None
    prompts = sampling.prompts_from(job.train_dataset, where)
    note_prompts(job, (prompt.messages for prompt in prompts))
    policy = generator_for(job, job.model.generates if job.model else None, generation)
    plan: dict[str, Any] = {
        "policy": policy,
        "n": 2,
        "seed": job.stage.random_seed,
        "max_new_tokens": generation.max_new_tokens,
        "batch_tokens": generation.batch_tokens,
    }
    digest, shown = sampling.texts_digest(prompts, **plan), progress(job, _title)
    with open_journal(job, digest, {"policy": policy.fingerprint}) as journal:
        groups = sampling.sample(
            prompts, **plan, journal=journal, stage="ai_feedback", on_batch=shown, should_stop=job.stop
        )
    return feedback.responses_of(groups), policy


def _labels(
    job: Job,
    method: "AIFeedback",
    judge: Chooser,
    thinker: Generator | None,
    generation: Generation,
    responses: Sequence["Responses"],
    name: str,
) -> list["Label"]:
    """The labels of pairs, from the journal as far as they are there."""
    from stagekit.trainers import comparisons, feedback

    note_prompts(job, (one.messages for one in responses))
    pairs = [one.pair for one in responses if one.drop is None]
    plan: dict[str, Any] = {
        "judge": judge,
        "thinker": thinker,
        "asking": asking_of(
            method.principles, method.comparison, method.choices, method.chain_of_thought, method.max_thought_tokens
        ),
        "seed": job.stage.random_seed,
        "batch_tokens": generation.batch_tokens,
    }
    digest = comparisons.verdicts_digest(pairs, **plan)
    with open_judgements(job, digest, judge, name) as journal:
        verdicts = comparisons.compare(
            pairs, **plan, journal=journal, on_batch=progress(job, _title), should_stop=job.stop
        )
    by_pair = {feedback.key_of(pair): verdict for pair, verdict in zip(pairs, verdicts, strict=True)}
    clamp = method.clamp if method.chain_of_thought else None
    return feedback.labels(responses, by_pair, tie_margin=method.tie_margin, clamp=clamp)


def _title(done: Any) -> str:
    return _TITLES[done.role]


def _say(job: Job, made: Sequence["Label"], rows: Sequence[Any], found: dict[str, float]) -> None:
    """What came of it, what each principle decided, examples, and a word where the judge is not to be trusted."""
    from stagekit.trainers import feedback

    dropped = ", ".join(f"{count} {reason}" for reason, count in feedback.drops(made).items()) or "none"
    job.show.line(f"  {len(made)} pairs gave {len(rows)} preferences; dropped: {dropped}")
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    if numbers:
        job.show.line(f"  {numbers}")
    table = feedback.by_principle(feedback.label_rows(made))
    if len(table) > 1:
        cells = [
            (name, str(one["labels"]), f"{one['decided']:.0%}", f"{one['right']:.0%}" if "right" in one else "")
            for name, one in table.items()
        ]
        job.show.table("  what each principle decided", ("principle", "labels", "decided", "right"), cells)
    for number, row in enumerate(rows[:3], start=1):
        parts = {
            "prompt": row["prompt"][-1]["content"],
            f"chosen ({row['chosen_prob']:.2f})": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
        job.show.sample(f"  sample {number}", parts)
    warn_of_judge(job.stage.name, found)


def warn_of_judge(stage: str, found: dict[str, float]) -> None:
    """A word where a judge does not answer, or is no better than a coin."""
    mass = found.get("judge/mass", 1.0)
    if mass < UNHEARD:
        logger.warning(
            "stage %r: the judge says one of the two choices with a probability of %.2g only; it would rather say "
            "something else. Ask it so that it answers with a choice (method.comparison, method.choices).",
            stage,
            mass,
        )
    accuracy = found.get("held_out/judge/accuracy", found.get("judge/accuracy", 1.0))
    if accuracy <= 0.5:
        logger.warning(
            "stage %r: the judge is right on %.0f %% of the pairs whose better response is known, no more than a coin "
            "would be; what is learnt from it is noise. Take a better judge.",
            stage,
            100 * accuracy,
        )
