"""What distillation costs beside SFT, and what it gains on a source that is known exactly.

    python -m benchmarks.distillation [--rounds 15] [--epochs 5] [--seeds 3] [--write]

Costs are CPU seconds (user + system) of one thread in one process; the sides of a comparison run in turn, and which
goes first alternates. Memory is the peak within a step, in processes of their own. The gain is the divergence of a
student from the Markov source that made its data, exact up to the held-out contexts. `--write` puts the tables into
benchmarks/README.md.
"""

import argparse
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.toys import llama, tokenizer
from stagekit.trainers.distillation import DistillationConfig, DistillationTrainer


WORDS, LENGTH, ROWS, BATCH = 8192, 96, 64, 8
"""Of the cost: vocabulary, tokens of a row, rows of an epoch, rows of a step."""

SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1000, "activation_checkpointing": False, "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
}  # fmt: skip


def distiller(student: Any, teacher: Any, data: Any, words: int, folder: str, **changes: Any) -> Any:
    """The trainer under test."""
    args = DistillationConfig(folder, **{**SETTINGS, **changes})
    return DistillationTrainer(
        student, args, teacher_model=teacher, teacher_processing_class=tokenizer(words), train_dataset=data,
        processing_class=tokenizer(words),
    )  # fmt: skip


def tuner(student: Any, data: Any, words: int, folder: str, **changes: Any) -> Any:
    """TRL's SFT beside it."""
    args = SFTConfig(folder, **{**SETTINGS, **changes})
    return SFTTrainer(student, args, train_dataset=data, processing_class=tokenizer(words))


def cost_data() -> Dataset:
    """Rows of random words, all of them labels."""
    torch.manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(WORDS - 2, (ROWS, LENGTH)).tolist()})


def cost_models() -> tuple[Any, Any]:
    """A student of 4 blocks, 256 wide, and a teacher of 8 blocks, 384 wide."""
    return llama(WORDS, 256, 4, 0), llama(WORDS, 384, 8, 1)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """User and system time of this process."""
    before = time.process_time()
    work()
    return time.process_time() - before


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every side, in turn, after one warm-up of each."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name in sides if number % 2 else reversed(sides):
            seconds = cpu_seconds(sides[name])
            if number >= 0:
                spent[name].append(seconds)
    return spent


def ratio_interval(ratios: Sequence[float]) -> str:
    """Geometric mean of the ratios, with two standard errors of the mean of their logs."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), 2 * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.3f} ({math.exp(mean - error):.3f} to {math.exp(mean + error):.3f})"


def online_cost(rounds: int, folder: str) -> list[str]:
    """A step with the teacher, beside an SFT step and a forward of the teacher."""
    student, teacher = cost_models()
    ours = distiller(student, teacher, cost_data(), WORDS, folder)
    theirs = tuner(llama(WORDS, 256, 4, 0), cost_data(), WORDS, folder)
    hidden = distiller(llama(WORDS, 256, 4, 0), teacher, cost_data(), WORDS, folder, match_hidden_states=True)

    def step(trainer: Any) -> Callable[[], Any]:
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(BATCH)])
        items = torch.tensor(BATCH * (LENGTH - 1))

        def work() -> None:
            trainer.model.train()
            trainer.model.zero_grad()
            trainer.training_step(trainer.model, dict(batch), items)

        return work

    ids = torch.tensor(cost_data()[:BATCH]["input_ids"])
    sides = {
        "sft": step(theirs),
        "teacher": torch.no_grad()(lambda: teacher(input_ids=ids, use_cache=False)),
        "distillation": step(ours),
        "hidden": step(hidden),
    }
    spent = interleaved(sides, rounds)
    both = [one + other for one, other in zip(spent["sft"], spent["teacher"], strict=True)]
    rows = []
    for name, what in (("distillation", "soft targets"), ("hidden", "and hidden states")):
        ratios = [one / other for one, other in zip(spent[name], both, strict=True)]
        ours_seconds, theirs_seconds = statistics.median(spent[name]), statistics.median(both)
        rows.append(f"| online step, {what} | {ours_seconds:.2f} s | SFT step + teacher forward, "
                    f"{theirs_seconds:.2f} s | {ratio_interval(ratios)} | 1.1 |")  # fmt: skip
    return rows


def cached_cost(epochs: int, folder: str) -> list[str]:
    """An epoch with a cached teacher beside an epoch of SFT, and the size of the cache."""
    student, teacher = cost_models()
    once = {"num_train_epochs": 1}
    cache = Path(folder, "cache")
    ours = distiller(student, teacher, cost_data(), WORDS, folder, teacher_cache=str(cache), **once)
    theirs = tuner(llama(WORDS, 256, 4, 0), cost_data(), WORDS, folder, **once)
    spent = interleaved({"sft": theirs.train, "cached": ours.train}, epochs)
    ratios = [one / other for one, other in zip(spent["cached"], spent["sft"], strict=True)]
    size = sum(file.stat().st_size for file in cache.rglob("*.safetensors")) / (ROWS * (LENGTH - 1))
    return [
        f"| cached epoch, top 64 | {statistics.median(spent['cached']):.2f} s | SFT epoch, "
        f"{statistics.median(spent['sft']):.2f} s | {ratio_interval(ratios)} | 1.15 |",
        f"| cache, bytes a token at top 64 | {size:.0f} | | | 512 |",
    ]


MEMORY_WORDS, SMALL = 32768, 64
"""Of the memory: vocabulary, so large that logits matter; tokens of a smaller chunk, to see what one takes."""

CHILD = """
import re, sys, tempfile
from pathlib import Path
import torch
from transformers import TrainerCallback
import trl.trainer.utils
torch.set_num_threads(1)
from benchmarks import distillation as b
b.WORDS, kind, chunk = b.MEMORY_WORDS, sys.argv[1], int(sys.argv[2])

class Peak(TrainerCallback):
    def on_step_begin(self, *_, **__):
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory in use is that from here on
    def on_step_end(self, *_, **__):
        self.found = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

with tempfile.TemporaryDirectory() as folder:
    student, teacher = b.cost_models()
    if kind == "sft":
        del teacher
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = chunk
        trainer = b.tuner(student, b.cost_data(), b.WORDS, folder, max_steps=3)
    else:
        changes = {"max_steps": 3, "chunk_tokens": chunk, "match_hidden_states": kind == "hidden"}
        trainer = b.distiller(student, teacher, b.cost_data(), b.WORDS, folder, **changes)
    peak = Peak()
    trainer.add_callback(peak)
    trainer.train()
print(peak.found * 1024)
"""


def peak(kind: str, chunk: int) -> int:
    """Bytes in use at most in the third step of a process that does nothing else; its moments are in the optimiser
    by then. malloc gives back what is freed, so that what was there before does not count."""
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(chunk)],
        capture_output=True, text=True, env={**os.environ, **malloc, "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def memory() -> list[str]:
    """The peak of a step that distils beside that of an SFT step, the teacher's weights and a chunk's logits; SFT
    once as TRL has it, once with a head in narrow tiles, which is the least that TRL's code takes here."""
    chunk, mib = DistillationConfig.chunk_tokens, 1 << 20
    plain, narrow = peak("sft", 32768), peak("sft", 1024)
    teacher = sum(parameter.numel() * 4 for parameter in llama(MEMORY_WORDS, 384, 8, 1).parameters())
    matrix = chunk * MEMORY_WORDS * 4
    found = {kind: peak(kind, chunk) for kind in ("soft", "hidden")}
    alive = (found["soft"] - peak("soft", SMALL)) / (matrix * (1 - SMALL / chunk))
    lines = []
    for kind, what in (("soft", "soft targets"), ("hidden", "and hidden states")):
        for name, sft in (("SFT", plain), ("SFT in narrow tiles", narrow)):
            most = sft + teacher + matrix
            lines.append(
                f"| peak of a step, {what} | {found[kind] / mib:.0f} MiB | {name} {sft / mib:.0f} + teacher "
                f"{teacher / mib:.0f} + a chunk's logits {matrix / mib:.0f} = {most / mib:.0f} MiB | "
                f"{found[kind] / most:.3f} | 1 |"
            )
    whole = BATCH * (LENGTH - 1) * MEMORY_WORDS * 4
    lines.append(
        f"| what a chunk adds to the peak | {alive:.1f} times its logits | all logits of the batch "
        f"{whole / mib:.0f} MiB | | |"
    )
    return lines


STATES = 62
"""States of the Markov source; with the end and the padding the vocabulary is 64."""


class Source:
    """A Markov chain of second order: the next word depends on the last two."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sharp = 2.5 * torch.randn(STATES, STATES, generator=generator)
        other = 1.5 * torch.randn(STATES, STATES, generator=generator)
        self.next = (sharp[:, None, :] + other[None, :, :]).log_softmax(-1)  # (last, before, next)
        self._generator = generator

    def rows(self, count: int, length: int = 32) -> torch.Tensor:
        """(count, length) words."""
        words = torch.randint(STATES, (count, 2), generator=self._generator)
        for _ in range(length - 2):
            chances = self.next[words[:, -1], words[:, -2]].exp()
            words = torch.cat([words, torch.multinomial(chances, 1, generator=self._generator)], dim=1)
        return words

    @torch.no_grad()
    def divergence(self, model: Any, words: torch.Tensor) -> float:
        """The mean KL(source || model) of the next word over held-out contexts of two words and more."""
        model.eval()
        logq = self.next[words[:, 1:-1], words[:, :-2]]
        logp = model(input_ids=words).logits[:, 1:-1].log_softmax(-1)[..., :STATES]
        return float((logq.exp() * (logq - logp)).sum(-1).mean())


def gains(seed: int, folder: str, teacher_rows: int = 8192, steps: int = 160) -> dict[str, float]:
    """KL(source || student) of students of one size and number of steps, by what they learnt from."""
    source, words = Source(seed), STATES + 2
    train, held_out = source.rows(256), source.rows(128)
    clean = Dataset.from_dict({"input_ids": train.tolist(), "labels": train.tolist()})
    drawn = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.randint(STATES, train.shape, generator=drawn)
    noise = torch.where(torch.rand(train.shape, generator=drawn) < 0.5, wrong, train)
    noisy = Dataset.from_dict({"input_ids": train.tolist(), "labels": noise.tolist()})
    plenty = Dataset.from_dict({"input_ids": source.rows(teacher_rows).tolist()})
    teacher = llama(words, 96, 4, seed)
    common = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "seed": seed}
    tuner(teacher, plenty, words, folder, **common, num_train_epochs=3).train()
    short = {**common, "max_steps": steps}
    found = {"teacher": source.divergence(teacher, held_out)}

    def student() -> Any:
        return llama(words, 48, 2, 100 + seed)

    def taught(name: str, data: Dataset, by: Any, **changes: Any) -> None:
        trainer = distiller(student(), by, data, words, folder, **short, alpha=0.9, temperature=1.0, **changes)
        trainer.train()
        found[name] = source.divergence(trainer.model, held_out)

    for name, data in (("SFT", clean), ("SFT, half of the labels noise", noisy)):
        trainer = tuner(student(), data, words, folder, **short)
        trainer.train()
        found[name] = source.divergence(trainer.model, held_out)
    taught("distilled", clean, teacher)
    taught("distilled, with hidden states", clean, teacher, match_hidden_states=True)
    taught("distilled, half of the labels noise", noisy, teacher)
    taught("distilled from a random teacher", clean, llama(words, 96, 4, 200 + seed))
    return found


def gain_table(seeds: int, folder: str) -> list[str]:
    """A row per condition, a column per seed."""
    columns = [gains(seed, folder) for seed in range(seeds)]
    lines = [
        "| KL(source \\|\\| student), nats | " + " | ".join(f"seed {seed}" for seed in range(seeds)) + " |",
        "|---" * (seeds + 1) + "|",
    ]
    for name in columns[0]:
        lines.append(f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in columns) + " |")
    return lines


def main() -> None:
    """Measure, print, and with `--write` put the tables into the README beside this file."""
    parser = argparse.ArgumentParser(description="what distillation costs and gains")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        costs = [*online_cost(given.rounds, folder), *cached_cost(given.epochs, folder), *memory()]
        print("\n".join(costs), flush=True)
        gained = gain_table(given.seeds, folder)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers"))
    lines = [
        f"`python -m benchmarks.distillation --rounds {given.rounds} --epochs {given.epochs} --seeds {given.seeds}`, "
        f"Python {platform.python_version()}, {packages}, one thread; CPU seconds, medians; load average {load:.1f} "
        f"on {os.cpu_count()} cores when it began.",
        "",
        "| what | distillation | beside | ratio (two standard errors) | at most |",
        "|---|---|---|---|---|",
        *costs,
        "",
        *gained,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if given.write:
        readme = Path(__file__).parent / "README.md"
        head, _, rest = readme.read_text().partition("<!-- distillation -->\n")
        tail = rest.partition("<!-- /distillation -->\n")[2]
        readme.write_text(f"{head}<!-- distillation -->\n{text}<!-- /distillation -->\n{tail}")


if __name__ == "__main__":
    main()
