"""The synthetic data stage: a teacher writes instructions and answers them; what is kept is written as a dataset."""

import dataclasses
from typing import TYPE_CHECKING, Any

from stagekit.constitution import _said
from stagekit.distillation_texts import _teacher
from stagekit.errors import StageError
from stagekit.generating import free_memory, generator_for, note_prompts, open_journal, progress, write_datasets
from stagekit.groups import Generation
from stagekit.job import Job, Outcome
from stagekit.rejection import scorer_for
from stagekit.scorers import free


if TYPE_CHECKING:
    from stagekit.adapters.synthetic_data import SyntheticData
    from stagekit.requests import Generator
    from stagekit.selection import Group
    from stagekit.trainers.sampling import Prompt
    from stagekit.trainers.synthetic import Answered, Instruction, Seed


TITLES = {"instruction": "instructions", "answer": "answers", "reward": "rewards"}


def run(job: Job, method: "SyntheticData") -> Outcome:
    """Write, choose, answer, score; leaves `rows` and `instructions`. A run that was killed goes on from its journals.

    Raises:
        StageError: nothing was kept, with the reasons; or a reward failed.
    """
    from stagekit.trainers import synthetic

    seeds = synthetic.seeds_from(job.train_dataset, f"{job.stage.path}.training_data") if _has_seeds(job) else []
    instructions, prompts, groups = _written(job, method, seeds)
    answered = _scored(job, method, instructions, prompts, groups)
    kept = synthetic.rows(answered)
    files = write_datasets(job, {"rows": kept, "instructions": synthetic.instruction_rows(instructions)})
    dropped = synthetic.drops(instructions, answered)
    job.show.line(f"  {len(instructions)} instructions gave {len(kept)} rows; dropped: {_said(dropped)}")
    if not kept:
        raise synthetic.nothing_kept(instructions, answered)
    for number, row in enumerate(kept[:3], start=1):
        said = {"instruction": row["prompt"][-1]["content"], "answer": row["completion"][0]["content"]}
        job.show.sample(f"  sample {number}", said)
    place = job.folder.relative_to(job.folder.parent) / "data"
    return Outcome(
        artifacts={"datasets": {name: str(place / file.name) for name, file in files.items()}},
        metrics=synthetic.metrics(instructions, answered),
        dropped=dropped,
    )


def _has_seeds(job: Job) -> bool:
    return job.train_dataset is not None


def _written(
    job: Job, method: "SyntheticData", seeds: list["Seed"]
) -> tuple[list["Instruction"], list["Prompt"], list["Group"]]:
    """The instructions, those that are kept as prompts, and the answers to these."""
    from stagekit.trainers import sampling, synthetic

    generation = job.stage.generation or Generation()
    teacher = _who(job, method, generation)
    wanted = synthetic.Wanted(method.instructions, method.examples, method.topics, method.request, method.example_line)
    shared: dict[str, Any] = {"seed": job.stage.random_seed, "batch_tokens": generation.batch_tokens}
    plan = {**shared, "max_new_tokens": method.max_instruction_tokens or generation.max_new_tokens}
    told: dict[str, Any] = {"on_batch": progress(job, lambda done: TITLES[done.role]), "should_stop": job.stop}
    info = {"teacher": teacher.fingerprint}
    digest = synthetic.instructions_digest(seeds, wanted, teacher=teacher, **plan)
    asks = synthetic.asks_for(seeds, wanted, job.stage.random_seed, digest)
    note_prompts(job, (ask.messages for ask in asks))
    with open_journal(job, digest, info, "instructions.jsonl") as journal:
        written = synthetic.write_instructions(seeds, wanted, teacher=teacher, journal=journal, **plan, **told)
    instructions = synthetic.choose(
        written,
        seeds,
        bounds=synthetic.Bounds(method.min_words, method.max_words),
        similarity=method.similarity,
        ngram=method.ngram,
    )
    prompts = [one.prompt for one in instructions if one.drop is None]
    note_prompts(job, (prompt.messages for prompt in prompts))
    plan = {**shared, "policy": teacher, "n": 1, "max_new_tokens": generation.max_new_tokens}
    with open_journal(job, sampling.texts_digest(prompts, **plan), info) as journal:
        groups = sampling.sample(prompts, **plan, journal=journal, stage="synthetic_data", **told)
    plan.clear()
    del teacher
    free_memory()
    return instructions, prompts, groups


def _scored(
    job: Job,
    method: "SyntheticData",
    instructions: list["Instruction"],
    prompts: list["Prompt"],
    groups: list["Group"],
) -> list["Answered"]:
    """The answers with what drops them: their form, and where there is a reward, what they are worth."""
    from stagekit.trainers import sampling, synthetic

    bounds = synthetic.Bounds(method.min_answer_words, method.max_answer_words)
    wrong = [
        synthetic.wrong_answer(prompt, group.candidates[0] if group.candidates else None, bounds)
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    if method.reward is not None:
        formed = [
            group if reason is None else dataclasses.replace(group, candidates=())
            for group, reason in zip(groups, wrong, strict=True)
        ]
        scorer = scorer_for(job, method.reward, f"{job.stage.path}.method.reward")
        told: dict[str, Any] = {"on_batch": progress(job, lambda done: TITLES[done.role]), "should_stop": job.stop}
        keys = [candidate.key for group in formed for candidate in group.candidates]
        digest = sampling.scores_digest(prompts, "\n".join(keys), scorer)
        with open_journal(job, digest, {"scorer": scorer.fingerprint}, "scores.jsonl") as journal:
            formed = sampling.score(formed, prompts, scorer=scorer, journal=journal, **told)
        free(scorer)
        free_memory()
        groups = [one if reason is None else group for one, group, reason in zip(formed, groups, wrong, strict=True)]
        wrong = [
            reason or synthetic.worth(group.candidates[0], method.min_reward)
            for group, reason in zip(groups, wrong, strict=True)
        ]
    kept = [one for one in instructions if one.drop is None]
    return [synthetic.Answered(*each) for each in zip(kept, groups, wrong, strict=True)]


def _who(job: Job, method: "SyntheticData", generation: Generation) -> "Generator":
    """Who writes: the teacher, or the stage's model; each in the dtype that it was saved in.

    Raises:
        StageError: an earlier stage left no teacher.
    """
    name = method.teacher
    if name is None:
        if generation.backend != "transformers":
            return generator_for(job, job.model.generates if job.model else None, generation)
        if job.model is None:
            raise StageError(f"stage {job.stage.name!r} has no model to write with")
        return _teacher(job, job.model.generates, None, generation, job.chat_template)
    if isinstance(name, str) and name.startswith("stage:"):
        policy = job.results[name.removeprefix("stage:")].policy
        if policy is None:
            raise StageError(f"stage {job.stage.name!r}: method.teacher {name!r} left no model")
        return _teacher(job, policy, None, generation)
    if isinstance(name, str):
        from stagekit.models import local_model

        name = local_model(name, where=f"{job.stage.path}.method.teacher")
    return _teacher(job, name, None, generation)
