"""The tables of `benchmarks/ppo.py`, of results that are made up: whether a line that is missed says so."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import overhead, ppo


def small_rows(ours: float, theirs: float, our_seconds: float) -> list[dict[str, Any]]:
    """Three seeds; the first rollouts of a run do not count."""
    return [
        {
            "seed": seed,
            "ours": {"scores": [9.0, ours, ours, ours], "cpu_seconds": our_seconds},
            "theirs": {"scores": [9.0, theirs, theirs + seed / 10, theirs], "cpu_seconds": 2.0},
        }
        for seed in range(3)
    ]


def test_a_score_below_the_other_sides_range_is_a_miss() -> None:
    assert "**missed**" not in "".join(ppo.small_table(small_rows(1.0, 1.0, 1.0)))
    assert sum("**missed**" in line for line in ppo.small_table(small_rows(0.9, 1.0, 1.0))) == 1
    assert sum("**missed**" in line for line in ppo.small_table(small_rows(0.9, 1.0, 2.1))) == 2


def chunk_results(seconds: float, growth: float) -> dict[str, Any]:
    spent = [
        {"seed": seed, "side": side, "chunk": chunk, "cpu_seconds": 2.0 if side == "theirs" else seconds}
        for seed in range(3)
        for side, chunk in ppo.settings()
    ]
    grown = [
        {"samples": samples, "side": side, "chunk": chunk, "growth": 100.0 * samples if side == "theirs" else growth}
        for samples in ppo.ROLLOUTS
        for side, chunk in ppo.settings()
    ]
    return {"seconds": {"rows": spent}, "memory": {"rows": grown}}


def test_time_and_memory_are_ratios_of_the_other_side() -> None:
    held, missed = (ppo.chunk_table(chunk_results(*given)) for given in ((2.2, 5120.0), (2.21, 5121.0)))
    assert not any("**missed**" in line for line in held)
    assert sum("**missed**" in line for line in missed) == 2
    assert any(line.startswith("| stagekit | 128 (default) | 2.20 | 1.10 |") for line in held)


def test_memory_is_shown_by_rollout() -> None:
    lines = ppo.memory_table(chunk_results(2.0, 3.0 * ppo.MIB))
    assert lines[-1] == "| stagekit, default | 3 | 3 | 3 |"


def pairs(ratios: list[float], same: bool = True) -> list[dict[str, Any]]:
    """Pairs of processes whose blocks have these ratios."""
    rest = {"kind": "grpo", "block": 2, "same": same, "rewards": 3, "fixed": (2, 1)}
    return [{"ours": [0.5 * ratio, 1.5 * ratio], "theirs": [0.5, 1.5], **rest} for ratio in ratios]


@pytest.mark.parametrize(("factor", "noise", "held"), [(1.01, 0.001, True), (1.1, 0.001, False), (1.0, 0.3, False)])
def test_an_overhead_is_held_by_an_interval_that_is_narrow_and_low(factor: float, noise: float, held: bool) -> None:
    lines = ppo.overhead_table(pairs([factor * (1 + noise * (-1) ** place) for place in range(10)]))
    row = next(line for line in lines if line.startswith("| grpo"))
    assert ("**missed**" in row) is not held
    assert "| 10 | all 30 the same | 2.0 s, bare 1.0 s |" in row


def test_parts_that_were_not_run_are_named() -> None:
    text = ppo.as_markdown({"small": {"load": "1.0", "rows": small_rows(1.0, 1.0, 1.0)}}, "python -m benchmarks.ppo")
    assert text.endswith("Not run yet: seconds, memory, overhead.\n")


def test_rewards_that_differ_are_told() -> None:
    lines = ppo.overhead_table([*pairs([1.0]), *pairs([1.1], same=False)])
    assert any("**not the same**" in line for line in lines)


def test_a_section_replaces_what_stood_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- ppo -->\nold\n<!-- /ppo -->\nb\n")
    monkeypatch.setattr(overhead, "__file__", str(tmp_path / "overhead.py"))
    overhead.write_section("ppo", "new\n")
    assert readme.read_text() == "a\n<!-- ppo -->\nnew\n<!-- /ppo -->\nb\n"
    with pytest.raises(ValueError, match="no lines <!-- other -->"):
        overhead.write_section("other", "new\n")
