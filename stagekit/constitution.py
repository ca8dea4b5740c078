"""The Constitutional AI stage's data: load who answers and who criticises, run the rounds, write the datasets."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stagekit.errors import Interrupted, StageError
from stagekit.groups import Generation
from stagekit.job import Job
from stagekit.options import function_name
from stagekit.requests import Generator, Sampling, ScriptedGenerator


if TYPE_CHECKING:
    from stagekit.adapters.constitutional import Constitutional


def prepare(job: Job, method: "Constitutional") -> Job:
    """Answer, criticise, revise; returns the job with the revisions as training data and `preferences` beside them.

    A run that was killed goes on from the journal; texts of other settings are put aside, never mixed in.
    """
    from datasets import Dataset

    from stagekit.rows import write_jsonl
    from stagekit.trainers import constitutional as cai

    prompts = _prompts(job, method)
    principles = _principles(method)
    generation = job.stage.generation or Generation()
    arguments: dict[str, Any] = {
        "policy": _generator(job, job.model.generates if job.model else None, generation),
        "critic": _critic(job, method, generation),
        "principles": principles,
        "rounds": method.rounds,
        "seed": job.stage.random_seed,
        "max_new_tokens": generation.max_new_tokens,
        "max_critique_tokens": method.max_critique_tokens or generation.max_new_tokens,
        "batch_tokens": generation.batch_tokens,
    }
    digest = cai.plan_digest(prompts, **arguments)
    with _journal(job, digest, arguments["policy"]) as journal:
        revisions = cai.revise(
            prompts, journal=journal, on_batch=_progress(job, method.rounds), should_stop=job.stop, **arguments
        )
    arguments.clear()
    _free()
    rows = cai.sft_rows(revisions, method.target)
    pairs = cai.preference_rows(revisions)
    files = {
        "revisions": job.folder / "data" / "revisions.jsonl",
        "preferences": job.folder / "data" / "preferences.jsonl",
    }
    files["revisions"].parent.mkdir(exist_ok=True)
    write_jsonl(rows, files["revisions"])
    write_jsonl(pairs, files["preferences"])
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


def _generator(job: Job, model: str | None, generation: Generation) -> Generator:
    """Who writes: the model in the stage's precision, or the function that stands in for it."""
    sampling = Sampling(
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        batch_tokens=generation.batch_tokens,
    )
    if generation.backend != "transformers":
        from stagekit.custom import resolve

        name = function_name(generation.backend)
        return ScriptedGenerator(resolve(generation.backend), fingerprint=f"{name} {sampling}")
    if model is None:
        raise StageError(f"stage {job.stage.name!r} has no model to generate with")
    import torch

    from stagekit.generation import TransformersGenerator
    from stagekit.models import load_policy, load_tokenizer, model_fingerprint

    bf16 = bool(job.setting("bf16"))
    lora = job.stage.lora
    quantization = None
    if lora is not None and lora.bits is not None:
        from stagekit.models import bnb_config

        quantization = bnb_config(lora.bits, torch.bfloat16 if bf16 else torch.float32)
    loaded = load_policy(
        model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        quantization=quantization,
        device_map="auto" if torch.cuda.is_available() else None,
    )
    tokenizer = load_tokenizer(model, job.chat_template)
    fingerprint = f"{model_fingerprint(model)} {loaded.dtype} {lora.bits if lora else None} {sampling}"
    return TransformersGenerator(loaded, tokenizer, sampling, fingerprint, on_token=_heartbeat(job))


def _critic(job: Job, method: "Constitutional", generation: Generation) -> Generator | None:
    name = method.critique_model
    if name is None or generation.backend != "transformers":
        return None
    if isinstance(name, str) and name.startswith("stage:"):
        policy = job.results[name.removeprefix("stage:")].policy
        if policy is None:
            raise StageError(f"stage {job.stage.name!r}: critique_model {name!r} left no model")
        return _generator(job, policy, generation)
    from stagekit.models import local_model

    return _generator(job, local_model(name, where=f"{job.stage.path}.method.critique_model"), generation)


def _journal(job: Job, digest: str, policy: Generator) -> Any:
    """The stage's journal. One of other settings is moved aside under its own digest, so that nothing is lost."""
    from stagekit.journal import Journal

    path = job.folder / "journal.jsonl"
    if path.exists():
        before = Journal.read(path).digest if path.stat().st_size else ""
        if before and before != digest:
            aside = path.with_name(f"journal-{before[:12]}.jsonl")
            path.rename(aside)
            job.show.line(f"  texts of other settings are kept in {aside.name}; these are written anew")
    return Journal.open(path, digest, {"policy": policy.fingerprint, "stage": job.stage.name})


def _progress(job: Job, rounds: int) -> Any:
    """A progress line per phase; the phases are known beforehand, so the user sees how many are left."""
    total = 1 + 2 * rounds
    bars: dict[str, Any] = {}

    def show(done: Any) -> None:
        number = 1 if done.role == "initial" else 2 * done.round + (0 if done.role == "critique" else 1)
        name = {"initial": "answers", "critique": "critiques", "revision": "revisions"}[done.role]
        title = f"{number}/{total} {name}" + (f", round {done.round}" if done.round else "")
        if title not in bars:
            bars[title] = job.show.progress(title, done.batches, "batch", "batches")
            bars[title].update(done.batch - 1, ago=done.duration_seconds)
        rate = done.new_tokens / max(done.duration_seconds, 1e-9)
        bars[title].update(done.batch, f", {rate:.0f} tokens/s")

    return show


def _heartbeat(job: Job) -> Any:
    """Between two batches minutes can pass: show how far the one under way is, and leave it when asked to stop."""
    bars: dict[str, Any] = {}

    def beat(rows: int, tokens: int, most: int) -> None:
        if job.stop():
            raise Interrupted(f"stage {job.stage.name!r} stopped while it was writing a batch of {rows} texts")
        if tokens == 1 or "bar" not in bars:
            bars["bar"] = job.show.progress(f"writing {rows} texts", most, "token", "tokens", passing=True)
        bars["bar"].update(tokens)

    return beat


def _said(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"


def _show_refusals(job: Job, metrics: Mapping[str, float]) -> None:
    rates = {name: value for name, value in metrics.items() if "refusal" in name}
    if rates:
        job.show.line(
            "  refusals among first answers: " + ", ".join(f"{name} {value:.0%}" for name, value in rates.items())
        )


def _free() -> None:
    """Give the generating models back before the trainer loads its own."""
    import gc
    import sys

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
