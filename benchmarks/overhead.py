"""What stagekit costs: a stage beside the bare TRL call, and how fast the commands answer.

    python -m benchmarks.overhead [--pairs 9] [--steps 60] [--write]

Each figure is the CPU time (user + system) of a whole process, so waiting for other processes of the machine does
not count. The two sides of a pair run right after one another, and which goes first alternates. The interval is that
of the mean of the log ratios (Student's t, 95 %), turned back into a ratio. `--write` puts the tables into
benchmarks/README.md.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).parent.parent
TINY = ROOT / "stagekit" / "recipes" / "data" / "tiny"
T_975 = {
    1: 12.706, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 14: 2.145, 19: 2.093,
}  # fmt: skip
"""Quantiles of Student's t by degrees of freedom."""

STAGE = """
import sys
from stagekit import DPO, SFT, LoRA, TrainingPipeline, TrainingStage
kind, rows, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
method = SFT() if kind == "sft" else DPO()
options = dict(max_steps=steps, learning_rate=1e-4, trl={"max_length": 128})
stage = TrainingStage(name="s", method=method, training_data=rows, **options)
TrainingPipeline(model=sys.argv[5], output_dir=out, stages=(stage,)).run(quiet=True)
"""

BARE = """
import sys
kind, rows, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
config = dict(output_dir=out, max_steps=steps, learning_rate=1e-4, max_length=128, bf16=False, use_cpu=True,
              activation_checkpointing=False, weight_decay=0.01, warmup_steps=0.1, lr_scheduler_type="cosine",
              save_total_limit=3, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
data = load_dataset("json", data_files=rows, split="train", cache_dir=out)
if kind == "sft":
    trainer = SFTTrainer(sys.argv[5], SFTConfig(**config), train_dataset=data)
else:
    trainer = DPOTrainer(sys.argv[5], args=DPOConfig(precompute_ref_log_probs=True, **config), train_dataset=data)
trainer.train()
trainer.save_model(out + "/final")
"""


def cpu_seconds(command: Sequence[str]) -> float:
    """CPU seconds of one process and its children.

    Raises:
        RuntimeError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of the ratios with its 95 % interval: (mean, low, high)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, spread = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    t = T_975.get(len(logs) - 1, 1.96)
    return math.exp(mean), math.exp(mean - t * spread), math.exp(mean + t * spread)


def stage_against_bare(kind: str, pairs: int, steps: int) -> dict[str, object]:
    """Interleaved pairs of a stage and the bare call with the same arguments, after one warm-up of each."""
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        answers = {"sft": ("completion",), "dpo": ("chosen", "rejected")}[kind]
        lines = (
            {"prompt": f"Count to {n}.", **{key: f"{key} {n} " + "word " * 12 for key in answers}} for n in range(256)
        )
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for pair in range(-1, pairs):
            for side in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
                script = STAGE if side == "ours" else BARE
                out = str(Path(folder, f"{side}-{pair}"))
                spent = cpu_seconds([sys.executable, "-c", script, kind, str(rows), out, str(steps), str(TINY)])
                if pair >= 0:
                    (ours if side == "ours" else theirs).append(spent)
    mean, low, high = ratio_interval([one / other for one, other in zip(ours, theirs, strict=True)])
    return {
        "what": f"{kind}, {steps} steps, tiny model",
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": mean,
        "low": low,
        "high": high,
        "pairs": pairs,
    }


def commands(pairs: int) -> list[dict[str, object]]:
    """CPU seconds of commands that people wait for, medians of `pairs` runs after a warm-up."""
    smoke = str(ROOT / "recipes" / "cai" / "smoke.yaml")
    bin_folder = Path(sys.executable).parent
    table = {
        "stagekit --help": [sys.executable, "-m", "stagekit", "--help"],
        "stagekit check (2 stages, 2 files)": [sys.executable, "-m", "stagekit", "check", smoke],
        "stagekit plan": [sys.executable, "-m", "stagekit", "plan", smoke],
        "trl sft --help": [str(bin_folder / "trl"), "sft", "--help"],
    }
    runs: dict[str, list[float]] = {name: [] for name in table}
    for number in range(-1, pairs):
        for name, command in table.items():
            spent = cpu_seconds(command)
            if number >= 0:
                runs[name].append(spent)
    return [{"what": name, "seconds": statistics.median(spent), "runs": pairs} for name, spent in runs.items()]


def as_markdown(stages: Sequence[dict[str, object]], answers: Sequence[dict[str, object]], command: str) -> str:
    """The tables, with the command and the versions that made them."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers"))
    lines = [
        f"`{command}`, Python {platform.python_version()}, {packages}, one thread; CPU seconds of whole processes, "
        "medians.",
        "",
        "| a stage beside the bare TRL call | stagekit | bare | ratio | 95 % interval | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for row in stages:
        lines.append(
            f"| {row['what']} | {row['ours']:.2f} s | {row['theirs']:.2f} s | {row['ratio']:.3f} "
            f"| {row['low']:.3f} to {row['high']:.3f} | {row['pairs']} |"
        )
    lines += ["", "| command | CPU seconds | runs |", "|---|---|---|"]
    lines += [f"| `{row['what']}` | {row['seconds']:.2f} | {row['runs']} |" for row in answers]
    return "\n".join(lines) + "\n"


def write_section(name: str, text: str) -> None:
    """Put text between the marks `<!-- name -->` and `<!-- /name -->` of the README beside this file.

    Raises:
        ValueError: the README has no such marks.
    """
    readme, start, end = Path(__file__).parent / "README.md", f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    head, found, rest = readme.read_text(encoding="utf-8").partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme} has no lines {start.strip()} and {end.strip()} to write between")
    readme.write_text(f"{head}{start}{text}{end}{tail}", encoding="utf-8")


def main() -> None:
    """Measure, print, and with `--write` put the tables into the README beside this file."""
    parser = argparse.ArgumentParser(description="what stagekit costs beside bare TRL")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    stages = [stage_against_bare(kind, given.pairs, given.steps) for kind in ("sft", "dpo")]
    command = f"python -m benchmarks.overhead --pairs {given.pairs} --steps {given.steps}"
    text = as_markdown(stages, commands(given.pairs), command)
    print(text)
    if given.write:
        write_section("overhead", text)


if __name__ == "__main__":
    main()
