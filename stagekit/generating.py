"""What the stage types that write their own data do with a job: who writes, the journal, progress, giving back."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stagekit import ranks
from stagekit.errors import Interrupted, StageError
from stagekit.groups import Generation, is_function, is_server
from stagekit.job import Job
from stagekit.journal import PROMPTS
from stagekit.options import function_name
from stagekit.requests import Generator, Message, Sampling, ScriptedGenerator


def generator_for(job: Job, model: str | None, generation: Generation) -> Generator:
    """Who writes: the model in the stage's precision, or the function that stands in for it."""
    sampling = Sampling(
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        batch_tokens=generation.batch_tokens,
    )
    if is_server(generation.backend):
        from stagekit.backends import ServerGenerator

        url, _, name = generation.backend.partition("#")
        return ServerGenerator(url, sampling, model=name or None)
    if is_function(generation.backend):
        from stagekit.custom import resolve

        name = function_name(generation.backend)
        return ScriptedGenerator(resolve(generation.backend), fingerprint=f"{name} {sampling}")
    if model is None:
        raise StageError(f"stage {job.stage.name!r} has no model to generate with")
    if generation.backend == "vllm":
        return _vllm(job, model, sampling)
    import torch

    from stagekit.fingerprints import model_fingerprint
    from stagekit.generation import TransformersGenerator
    from stagekit.models import device_map, load_policy, load_tokenizer

    bf16 = _in_bf16(job)
    lora = job.stage.lora
    quantization = None
    if lora is not None and lora.bits is not None:
        from stagekit.models import bnb_config

        quantization = bnb_config(lora.bits, torch.bfloat16 if bf16 else torch.float32)
    loaded = load_policy(
        model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        quantization=quantization,
        device_map=device_map(),
    )
    tokenizer = load_tokenizer(model, job.chat_template)
    bits, template = lora.bits if lora else None, template_mark(job.chat_template, tokenizer)
    fingerprint = f"{model_fingerprint(model)} {loaded.dtype} {bits} {sampling}{template}"
    return TransformersGenerator(loaded, tokenizer, sampling, fingerprint, on_token=heartbeat(job))


def template_mark(given: str | None, tokenizer: Any) -> str:
    """What a fingerprint says of a template that was given in the place of the model's own (its text, be it named by a
    file); nothing where none was."""
    from stagekit.counters import digest_of

    return "" if given is None else f" template {digest_of(tokenizer.chat_template)[:16]}"


def _in_bf16(job: Job) -> bool:
    """Whether texts are written in bfloat16: as the stage trains, or, where it has no trainer, as it says itself."""
    stage = job.stage
    if stage.method.config_class is None:
        return stage.use_mixed_precision and stage.mixed_precision_dtype == "bf16"
    return bool(job.setting("bf16"))


def _vllm(job: Job, model: str, sampling: Sampling) -> Generator:
    from stagekit.backends import VLLMGenerator
    from stagekit.fingerprints import model_fingerprint
    from stagekit.models import adapter_base, load_tokenizer

    if adapter_base(model) is not None:
        raise StageError(
            f"stage {job.stage.name!r}: generation.backend: vllm reads full weights, and {model} is an adapter; set "
            "lora.merge: true in the stage before, or use transformers"
        )
    tokenizer = load_tokenizer(model, job.chat_template)
    fingerprint = f"vllm {model_fingerprint(model)} {sampling}{template_mark(job.chat_template, tokenizer)}"
    return VLLMGenerator(model, tokenizer, sampling, fingerprint)


def open_journal(job: Job, digest: str, info: dict[str, Any], name: str = "journal.jsonl") -> Any:
    """A journal in the job's folder. One of other settings is moved aside under its own digest, so that nothing is
    lost. Of several processes the first one writes it, the others have in memory what it holds."""
    from stagekit.journal import Journal

    path = job.folder / name
    journal = _opened(job, path, digest, info) if ranks.rank() == 0 else None
    ranks.wait()
    return journal if journal is not None else Journal.follow(path, digest)


def _opened(job: Job, path: Path, digest: str, info: dict[str, Any]) -> Any:
    from stagekit.journal import Journal

    if path.exists():
        before = Journal.read(path).digest if path.stat().st_size else ""
        if before and before != digest:
            aside = path.with_name(f"{path.stem}-{before[:12]}.jsonl")
            path.rename(aside)
            job.show.line(f"  texts of other settings are kept in {aside.name}; these are written anew")
    return Journal.open(path, digest, {**info, "stage": job.stage.name})


def note_prompts(job: Job, conversations: Iterable[Sequence[Message]]) -> None:
    """Write what is asked to `prompts.jsonl`, once each, before it is answered: the journals name it by its digest, so
    that the audit can show every text with its prompt, also of a run that is under way or failed."""
    from stagekit.counters import digest_of
    from stagekit.rows import read_jsonl, write_jsonl

    path = job.folder / PROMPTS

    def write() -> None:
        found = {row["id"]: row for row in read_jsonl(path)} if path.is_file() else {}
        for messages in conversations:
            name = digest_of(list(messages))
            found[name] = {"id": name, "prompt": [dict(message) for message in messages]}
        write_jsonl(list(found.values()), path)

    ranks.once(write)


def progress(job: Job, titles: Callable[[Any], str]) -> Any:
    """A progress line per phase, for `on_batch`; `titles` names the phase of a batch."""
    bars: dict[str, Any] = {}

    def show(done: Any) -> None:
        title = titles(done)
        if title not in bars:
            bars[title] = job.show.progress(title, done.batches, "batch", "batches")
            bars[title].update(done.batch - 1, ago=done.duration_seconds)
        rate = done.new_tokens / max(done.duration_seconds, 1e-9)
        bars[title].update(done.batch, f", {rate:.0f} tokens/s" if done.new_tokens else "")

    return show


def heartbeat(job: Job) -> Any:
    """Between two batches minutes can pass: show how far the one under way is, and leave it when asked to stop."""
    bars: dict[str, Any] = {}

    def beat(rows: int, tokens: int, most: int) -> None:
        if job.stop():
            raise Interrupted(f"stage {job.stage.name!r} stopped while it was writing a batch of {rows} texts")
        if tokens == 1 or "bar" not in bars:
            bars["bar"] = job.show.progress(f"writing {rows} texts", most, "token", "tokens", passing=True)
        bars["bar"].update(tokens)

    return beat


def free_memory() -> None:
    """Give the generating models back before the trainer loads its own."""
    import gc
    import sys

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_datasets(job: Job, datasets: dict[str, Sequence[Any]]) -> dict[str, Any]:
    """Write datasets that the stage leaves to `data/` in its folder: name -> file. The first process writes."""
    from stagekit.rows import write_jsonl

    folder = job.folder / "data"
    files = {name: folder / f"{name}.jsonl" for name in datasets}

    def write() -> None:
        folder.mkdir(exist_ok=True)
        for name, rows in datasets.items():
            write_jsonl(rows, files[name])

    ranks.once(write)
    return files
