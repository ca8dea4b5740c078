"""PPO beside that of TRL 1.12, and GRPO and RLOO stages beside TRL's trainers.

    python -m pip install --no-deps --target DIR "trl==1.12.*"
    python -m benchmarks.ppo --trl112 DIR [--seeds 5] [--pairs 9] [--only PART ...] [--write]

Both sides of a comparison run under the same interpreter; TRL 1.12 comes first on the path of its own processes only.
Seconds are CPU seconds (user + system) of one thread. Those of PPO are of `train()`, without imports and loading, in a
process for each side; the sides take turns, seed by seed. Memory is the growth of a fresh process's peak (VmHWM)
during `train()` over what was resident before. Results are kept in benchmarks/results/ppo.json, part by part;
`--write` puts the tables into benchmarks/README.md.
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
DEFAULT, TRLS = 128, 4096
"""Tokens whose logits are held at once: by default on the CPU, and TRL's own number."""
CHUNKS: tuple[int, ...] = (32, DEFAULT, TRLS)
ROLLOUTS = (64, 256, 384)
LARGE = {"words": 16_000, "length": 64, "updates": 1, "epochs": 1}
MIB = 1 << 20


class Side:
    """A process that trains one side, task by task; used as a context."""

    def __init__(self, name: str, trl112: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        if name == "theirs":
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (trl112, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.ppo_sides", name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=environment, cwd=ROOT, **pipes)
        self.name = name

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def do(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """What came of a task.

        Raises:
            RuntimeError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("DONE "):
                found: dict[str, Any] = json.loads(line.removeprefix("DONE "))
                return found
        raise RuntimeError(f"{self.name} ended; by hand: echo '{json.dumps(task)}' | python -m benchmarks.ppo_sides")


def small(given: argparse.Namespace) -> list[dict[str, Any]]:
    """15 rollouts over 48 words by both, seed by seed."""
    rows = []
    with Side("ours", given.trl112) as ours, Side("theirs", given.trl112) as theirs:
        for one in (ours, theirs):
            one.do({"seed": 0, "updates": 1})  # warms up
        for seed in range(1, given.seeds + 1):
            sides = (ours, theirs) if seed % 2 else (theirs, ours)
            rows.append({"seed": seed, **{side.name: side.do({"seed": seed}) for side in sides}})
            print(f"small: {json.dumps(rows[-1])}", flush=True)
    return rows


def settings() -> list[tuple[str, int | None]]:
    """What is compared over a large vocabulary: TRL 1.12, and ours by chunk."""
    return [("theirs", None), *(("ours", chunk) for chunk in CHUNKS)]


def large_task(seed: int, samples: int, chunk: int | None) -> dict[str, Any]:
    """One rollout over the large vocabulary."""
    options = {} if chunk is None else {"options": {"logit_chunk_size": chunk}}
    return {"seed": seed, "samples": samples, **LARGE, **options}


def seconds(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A rollout of 64 over 16,000 words, by setting and seed."""
    rows = []
    with Side("ours", given.trl112) as ours, Side("theirs", given.trl112) as theirs:
        sides = {"ours": ours, "theirs": theirs}
        for one in sides.values():
            one.do({"seed": 0, "updates": 1})  # warms up
        for seed in range(1, given.seeds + 1):
            for side, chunk in settings() if seed % 2 else reversed(settings()):
                found = {"seed": seed, "side": side, "chunk": chunk}
                rows.append(found | sides[side].do(large_task(seed, ROLLOUTS[0], chunk)))
                print(f"seconds: {json.dumps(rows[-1])}", flush=True)
    return rows


def memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The same by setting, and by the size of the rollout, each in a fresh process."""
    rows = []
    wanted = [(ROLLOUTS[0], side, chunk) for side, chunk in settings()]
    wanted += [
        (samples, side, chunk) for samples in ROLLOUTS[1:] for side, chunk in settings() if chunk in (None, DEFAULT)
    ]
    for samples, name, chunk in wanted:
        with Side(name, given.trl112) as side:
            found = {"samples": samples, "side": name, "chunk": chunk, **side.do(large_task(1, samples, chunk))}
        rows.append(found)
        print(f"memory: {json.dumps(found)}", flush=True)
    return rows


def overhead(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Stages beside bare trainers, in lockstep. Each pair is of two fresh processes, since one process is faster than
    another for all of its life, whatever it runs."""
    rows = []
    for kind in ("grpo", "rloo"):
        for _ in range(given.pairs):
            found = compare(kind, given.blocks, given.block, TINY)
            rows.append({"kind": kind, "block": given.block, **vars(found)})
            print(f"overhead: {json.dumps(rows[-1])}", flush=True)
    return rows


PARTS = {"small": small, "seconds": seconds, "memory": memory, "overhead": overhead}


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


def chunk_table(found: Mapping[str, Any]) -> list[str]:
    """Seconds and memory by chunk."""
    spent = {
        one: [row["cpu_seconds"] for row in found["seconds"]["rows"] if _setting(row) == one] for one in settings()
    }
    grown = {one: _growth(found, ROLLOUTS[0], one) for one in settings()}
    theirs = settings()[0]
    lines = [
        f"One rollout of {ROLLOUTS[0]} completions of {LARGE['length']} tokens over {LARGE['words']:,} words, one "
        f"pass; seconds are medians of {len(spent[theirs])} seeds, ratios medians seed by seed, memory of one fresh "
        "process each:",
        "",
        "| | `logit_chunk_size` | CPU s | of TRL 1.12's | peak growth, MiB | of TRL 1.12's |",
        "|---|---|---|---|---|---|",
    ]
    times, sizes = [], []
    for one in settings():
        time = statistics.median(own / other for own, other in zip(spent[one], spent[theirs], strict=True))
        size = grown[one] / grown[theirs]
        if one != theirs:
            times.append(time)
            sizes.append(size)
        name = {None: "", DEFAULT: f"{DEFAULT} (default)", TRLS: f"{TRLS} (TRL 1.16's)"}.get(one[1], str(one[1]))
        lines.append(
            f"| {'TRL 1.12' if one == theirs else 'stagekit'} | {name} | {statistics.median(spent[one]):.2f} "
            f"| {time:.2f} | {grown[one] / MIB:.0f} | {size:.2f} |"
        )
    return [
        *lines,
        "",
        f"* one setting takes at most 1.1 of the time: {_held(min(times) <= 1.1)}",
        f"* one setting grows by at most 0.8 of the memory: {_held(min(sizes) <= 0.8)}",
    ]


def memory_table(found: Mapping[str, Any]) -> list[str]:
    """Memory by the size of the rollout."""
    lines = [
        "| peak growth, MiB | " + " | ".join(f"R = {samples}" for samples in ROLLOUTS) + " |",
        "|---" * (len(ROLLOUTS) + 1) + "|",
    ]
    for one, name in ((("theirs", None), "TRL 1.12"), (("ours", DEFAULT), "stagekit, default")):
        cells = [f"{_growth(found, samples, one) / MIB:.0f}" for samples in ROLLOUTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _setting(row: Mapping[str, Any]) -> tuple[str, int | None]:
    return row["side"], row["chunk"]


def _growth(found: Mapping[str, Any], samples: int, setting: tuple[str, int | None]) -> float:
    rows = found["memory"]["rows"]
    return float(next(row["growth"] for row in rows if row["samples"] == samples and _setting(row) == setting))


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ratios of the steps of each pair of processes, and what lies outside of the steps."""
    steps = rows[0]["block"] * len(rows[0]["ours"])
    lines = [
        f"{steps} steps in lockstep, {rows[0]['block']} at a time, tiny model; what a process spends outside of them "
        "(Python, imports, loading, saving, and the stage's checks) apart; medians:",
        "",
        "| | stagekit, s a step | bare, s | ratio | 95 % interval | pairs | rewards | outside of the steps | 1.02 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        sums = [(sum(row["ours"]), sum(row["theirs"])) for row in own]
        mean, low, high = ratio_interval([ours / theirs for ours, theirs in sums])
        ours, theirs = (statistics.median(side) / steps for side in zip(*sums, strict=True))
        count = sum(row["rewards"] for row in own)
        same = f"all {count} the same" if all(row["same"] for row in own) else "**not the same**"
        fixed, bare = (statistics.median(side) for side in zip(*(row["fixed"] for row in own), strict=True))
        held = _held(low <= 1.02 and high - low < 0.06)
        lines.append(
            f"| {kind} | {ours:.3f} | {theirs:.3f} | {mean:.3f} | {low:.3f} to {high:.3f} | {len(own)} | {same} "
            f"| {fixed:.1f} s, bare {bare:.1f} s | {held} |"
        )
    return [*lines, "", "Held: the interval contains a value of at most 1.02 and is narrower than 0.06."]


def _held(holds: bool) -> str:
    return "held" if holds else "**missed**"


def as_markdown(found: Mapping[str, Any], command: str) -> str:
    """All tables that have results, with the command and the versions that made them."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers"))
    lines = [f"`{command}`, Python {platform.python_version()}, {packages}, one thread, CPU; load average on "
             f"{os.cpu_count()} cores {_loads(found)}."]  # fmt: skip
    if "small" in found:
        lines += ["", *small_table(found["small"]["rows"])]
    if "seconds" in found and "memory" in found:
        lines += ["", *chunk_table(found)]
    if "memory" in found:
        lines += ["", *memory_table(found)]
    if "overhead" in found:
        lines += ["", *overhead_table(found["overhead"]["rows"])]
    missing = [part for part in PARTS if part not in found]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _loads(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{found[part]['load']} ({part})" for part in PARTS if part in found)


def main() -> None:
    """Measure what is asked for, keep it, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl112", help="the folder that TRL 1.12 was installed into")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=9, help="pairs of processes of the overhead (default 9)")
    parser.add_argument("--blocks", type=int, default=10, help="turns of each of them that are measured (default 10)")
    parser.add_argument("--block", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="none: the tables alone")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.trl112 is None and set(given.only) - {"overhead"}:
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
