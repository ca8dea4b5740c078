"""PPO beside that of TRL 1.12, and GRPO and RLOO stages beside TRL's trainers.

    python -m pip install --no-deps --target DIR "trl==1.12.*"
    python -m benchmarks.ppo --trl112 DIR [--seeds 5] [--pairs 20] [--only small large overhead] [--write]

Both sides of a comparison run under the same interpreter; TRL 1.12 comes first on the path of its own processes only.
Seconds are CPU seconds (user + system) of one thread. Those of PPO are of `train()`, without imports and loading;
sides take turns, seed by seed. Memory is the growth of a fresh process's peak (VmHWM) during `train()` over what was
resident before. Results are kept in benchmarks/results/ppo.json, part by part; `--write` puts the tables into
benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.lockstep import compare
from benchmarks.overhead import ROOT, TINY, ratio_interval, write_section


RESULTS = Path(__file__).parent / "results" / "ppo.json"
CHUNKS: tuple[int, ...] = (32, 128, 512, 4096)
"""Tokens whose logits are held at once; 128 is the default on the CPU, 4096 is TRL's own."""
DEFAULT = 128
ROLLOUTS = (64, 256, 384)
LARGE = {"words": 16_000, "length": 64, "updates": 1, "epochs": 1}
MIB = 1 << 20


def child(side: str, task: Mapping[str, Any], trl112: str) -> dict[str, Any]:
    """Train one side in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if side == "theirs":
        environment["PYTHONPATH"] = trl112
    command = [sys.executable, "-m", "benchmarks.ppo_sides", side, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def small(given: argparse.Namespace) -> list[dict[str, Any]]:
    """15 rollouts over 48 words by both, seed by seed."""
    rows = []
    for seed in range(1, given.seeds + 1):
        sides = ("ours", "theirs") if seed % 2 else ("theirs", "ours")
        rows.append({"seed": seed, **{side: child(side, {"seed": seed}, given.trl112) for side in sides}})
        print(f"small, seed {seed}: {json.dumps(rows[-1])}", flush=True)
    return rows


def large(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One rollout over 16,000 words, by chunks and by rollout sizes; the rollouts of 64 with every seed."""
    rows = []
    for seed in range(1, given.seeds + 1):
        for samples in ROLLOUTS if seed == 1 else ROLLOUTS[:1]:
            chunks = CHUNKS if samples == ROLLOUTS[0] else (DEFAULT,)
            sides: list[tuple[str, int | None]] = [("theirs", None), *(("ours", chunk) for chunk in chunks)]
            for side, chunk in sides if seed % 2 else reversed(sides):
                task = {"seed": seed, "samples": samples, **LARGE}
                if chunk is not None:
                    task["options"] = {"logit_chunk_size": chunk}
                found = {"seed": seed, "samples": samples, "side": side, "chunk": chunk}
                found |= child(side, task, given.trl112)
                rows.append(found)
                print(f"large: {json.dumps(found)}", flush=True)
    return rows


def overhead(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Stages beside bare trainers, in lockstep."""
    rows = []
    for kind in ("grpo", "rloo"):
        found = compare(kind, given.pairs, given.block, TINY)
        rows.append({"kind": kind, "pairs": given.pairs, "block": given.block, **vars(found)})
        print(f"overhead, {kind}: {json.dumps(rows[-1])}", flush=True)
    return rows


PARTS = {"small": small, "large": large, "overhead": overhead}


def small_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Scores and seconds of both sides."""
    lines = [
        f"Final score (mean of the last three of {len(rows[0]['ours']['scores'])} rollouts) and seconds of training, "
        "48 words:",
        "",
        "| | " + " | ".join(f"seed {row['seed']}" for row in rows) + " | range | CPU s, median |",
        "|---" * (len(rows) + 3) + "|",
    ]
    ends, seconds = {}, {}
    for side, name in (("theirs", "TRL 1.12"), ("ours", "stagekit")):
        ends[side] = [statistics.fmean(row[side]["scores"][-3:]) for row in rows]
        seconds[side] = [row[side]["cpu_seconds"] for row in rows]
        shown = " | ".join(f"{end:.2f}" for end in ends[side])
        lines.append(
            f"| {name} | {shown} | {min(ends[side]):.2f} to {max(ends[side]):.2f} "
            f"| {statistics.median(seconds[side]):.2f} |"
        )
    ratio = statistics.median(one / other for one, other in zip(seconds["ours"], seconds["theirs"], strict=True))
    mean, low = statistics.fmean(ends["ours"]), min(ends["theirs"])
    return [
        *lines,
        "",
        f"* mean score {mean:.2f}, at least the lowest of TRL 1.12's seeds, {low:.2f}: {_held(mean >= low)}",
        f"* seconds, median ratio over the seeds {ratio:.2f}, at most 1.0: {_held(ratio <= 1.0)}",
    ]


def large_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seconds and memory by chunk, memory by size of the rollout."""

    def of(side: str, samples: int, chunk: int | None, what: str) -> list[float]:
        wanted = (side, samples, chunk)
        return [row[what] for row in rows if (row["side"], row["samples"], row["chunk"]) == wanted]

    first, theirs = ROLLOUTS[0], {}
    for what in ("cpu_seconds", "growth"):
        theirs[what] = of("theirs", first, None, what)
    lines = [
        f"One rollout of {first} completions of {LARGE['length']} tokens over {LARGE['words']:,} words, one pass; "
        f"medians of {len(theirs['growth'])} seeds, ratios seed by seed:",
        "",
        "| `logit_chunk_size` | CPU s | of TRL 1.12's | peak growth, MiB | of TRL 1.12's |",
        "|---|---|---|---|---|",
        f"| (TRL 1.12) | {statistics.median(theirs['cpu_seconds']):.2f} | 1 "
        f"| {statistics.median(theirs['growth']) / MIB:.0f} | 1 |",
    ]
    ratios: dict[str, list[float]] = {"cpu_seconds": [], "growth": []}
    for chunk in CHUNKS:
        cells = []
        for what, unit in (("cpu_seconds", 1), ("growth", MIB)):
            own = of("ours", first, chunk, what)
            ratios[what].append(statistics.median(one / other for one, other in zip(own, theirs[what], strict=True)))
            cells.append(f"{statistics.median(own) / unit:.{2 if unit == 1 else 0}f} | {ratios[what][-1]:.2f}")
        name = {DEFAULT: " (default)", 4096: " (TRL 1.16's)"}.get(chunk, "")
        lines.append(f"| {chunk}{name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"* one setting takes at most 1.1 of the time: {_held(min(ratios['cpu_seconds']) <= 1.1)}",
        f"* one setting grows by at most 0.8 of the memory: {_held(min(ratios['growth']) <= 0.8)}",
        "",
        "| peak growth, MiB, and CPU s by rollout | " + " | ".join(f"R = {samples}" for samples in ROLLOUTS) + " |",
        "|---" * (len(ROLLOUTS) + 1) + "|",
    ]
    for side, chunk, name in (("theirs", None, "TRL 1.12"), ("ours", DEFAULT, "stagekit, default")):
        cells = [
            f"{of(side, samples, chunk, 'growth')[0] / MIB:.0f}, {of(side, samples, chunk, 'cpu_seconds')[0]:.1f} s"
            for samples in ROLLOUTS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ratios of blocks of steps, and what lies outside of the steps."""
    lines = [
        f"Blocks of {rows[0]['block']} steps in lockstep, tiny model; what a process spends outside of its steps "
        "(Python, imports, loading, saving, and the stage's checks) apart:",
        "",
        "| | stagekit, s a block | bare, s | ratio | 95 % interval | pairs | rewards | outside of the steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [one / other for one, other in zip(row["ours"], row["theirs"], strict=True)]
        mean, low, high = ratio_interval(ratios)
        same = f"all {row['rewards']} the same" if row["same"] else "**not the same**"
        ours, bare = row["fixed"]
        lines.append(
            f"| {row['kind']} | {statistics.median(row['ours']):.3f} | {statistics.median(row['theirs']):.3f} "
            f"| {mean:.3f} | {low:.3f} to {high:.3f} | {len(ratios)} | {same} | {ours:.1f} s, bare {bare:.1f} s |"
        )
        held = low <= 1.02 and high - low < 0.06
        lines.append(f"| | | | at most 1.02 within | narrower than 0.06 | | | {_held(held)} |")
    return lines


TABLES = {"small": small_table, "large": large_table, "overhead": overhead_table}


def _held(holds: bool) -> str:
    return "held" if holds else "**missed**"


def as_markdown(found: Mapping[str, Any], command: str) -> str:
    """All tables that have results, with the command and the versions that made them."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers"))
    lines = [f"`{command}`, Python {platform.python_version()}, {packages}, one thread, CPU."]
    for part, table in TABLES.items():
        if part in found:
            lines += [
                "",
                *table(found[part]["rows"]),
                "",
                f"Load average {found[part]['load']} on {os.cpu_count()} cores.",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is asked for, keep it, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl112", help="the folder that TRL 1.12 was installed into")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--block", type=int, default=6, help="steps of a block of the overhead (default 6)")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="none: the tables alone")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.trl112 is None and {"small", "large"} & set(given.only):
        parser.error("--trl112 DIR is needed for TRL 1.12; see above how to install it")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in given.only:
        load = f"{os.getloadavg()[0]:.1f}"
        found[part] = {"load": load, "rows": PARTS[part](given)}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    command = f"python -m benchmarks.ppo --trl112 DIR --seeds {given.seeds} --pairs {given.pairs}"
    text = as_markdown(found, command)
    print(text)
    if given.write:
        write_section("ppo", text)


if __name__ == "__main__":
    main()
