"""Distillation by text: the teacher answers the prompts, journalled, and the student learns its answers."""

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from stagekit.constitution import _said
from stagekit.errors import ConfigError, StageError
from stagekit.generating import (
    free_memory,
    generator_for,
    heartbeat,
    note_prompts,
    open_journal,
    progress,
    template_mark,
    write_datasets,
)
from stagekit.groups import Generation
from stagekit.job import Job


if TYPE_CHECKING:
    from stagekit.requests import Generator
    from stagekit.trainers.constitutional_rows import Trace


ROUNDS = 1
"""The machinery of Constitutional AI, with prompts that are only answered: nothing is revised in its one round."""


def prepare(job: Job, teacher: Any, quantization: Any) -> Job:
    """The job with the teacher's answers as training data. A run that was killed goes on from the journal.

    Args:
        teacher: A folder, a hub id, or a live model.
        quantization: A `BitsAndBytesConfig` for a teacher by name.

    Raises:
        ConfigError: the student has no chat template to learn them in.
        StageError: no answer can be learnt.
    """
    from datasets import Dataset

    from stagekit.trainers import constitutional as cai

    if not job.tokenizer.chat_template:
        raise ConfigError(
            f"chat_template: the student of stage {job.stage.name!r} has none, and the teacher's answers are "
            "conversations; set chat_template in the pipeline"
        )
    generation = job.stage.generation or Generation()
    prompts = cai.prompts_from(job.train_dataset, revise=False)
    note_prompts(job, (prompt.messages for prompt in prompts))
    arguments: dict[str, Any] = {
        "policy": _teacher(job, teacher, quantization, generation),
        "rounds": ROUNDS,
        "seed": job.stage.random_seed,
        "max_new_tokens": generation.max_new_tokens,
        "batch_tokens": generation.batch_tokens,
    }
    digest = cai.plan_digest(prompts, **arguments)
    titles = progress(job, lambda done: "answers of the teacher")
    with open_journal(job, digest, {"policy": arguments["policy"].fingerprint}) as journal:
        found = cai.revise(prompts, journal=journal, on_batch=titles, should_stop=job.stop, **arguments)
    arguments.clear()
    free_memory()
    dropped = Counter(reason for trace in found.traces if (reason := _why_not(trace)) is not None)
    rows = [
        {"prompt": list(trace.prompt.messages), "completion": [{"role": "assistant", "content": trace.initial.text}]}
        for trace in found.traces
        if trace.initial is not None and _why_not(trace) is None
    ]
    job.show.line(f"  {len(prompts)} prompts gave {len(rows)} answers to learn; dropped: {_said(dropped)}")
    if not rows:
        raise StageError(
            f"stage {job.stage.name!r}: the teacher gave no answer to learn ({_said(dropped)}). Raise "
            "generation.max_new_tokens if they are truncated; shorten the prompts if they are too_long"
        )
    files = write_datasets(job, {"answers": rows})
    counted = {f"answers.{reason}": count for reason, count in dropped.items()}
    return dataclasses.replace(job, train_dataset=Dataset.from_list(rows), datasets=files, dropped=counted)


def _why_not(trace: "Trace") -> str | None:
    """Why an answer is not learnt. One that was cut would be given an end where the teacher had none."""
    if trace.drop is not None or trace.initial is None:
        return trace.drop or "error"
    return "truncated" if trace.initial.truncated else None


def _teacher(
    job: Job, teacher: Any, quantization: Any, generation: Generation, chat_template: str | None = None
) -> "Generator":
    """Who writes: the teacher in its own dtype, with its own template unless another is given; or the function that
    stands in for it."""
    if generation.backend != "transformers":
        return generator_for(job, teacher if isinstance(teacher, str) else None, generation)
    from stagekit.fingerprints import model_fingerprint, weights_fingerprint
    from stagekit.generation import TransformersGenerator
    from stagekit.models import device_map, load_policy, load_tokenizer
    from stagekit.requests import Sampling

    sampling = Sampling(generation.temperature, generation.top_p, generation.top_k, generation.batch_tokens)
    if isinstance(teacher, str):
        loaded = load_policy(teacher, dtype="auto", quantization=quantization, device_map=device_map())
        name, identity = teacher, model_fingerprint(teacher)
    else:
        loaded, name, identity = teacher, teacher.name_or_path, weights_fingerprint(teacher)
    tokenizer = load_tokenizer(name, chat_template)
    template = template_mark(chat_template, tokenizer)
    fingerprint = f"{identity} {loaded.dtype} {quantization is not None} {sampling}{template}"
    return TransformersGenerator(loaded, tokenizer, sampling, fingerprint, on_token=heartbeat(job))
