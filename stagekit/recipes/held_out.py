"""How the rewards of a stage began and ended on its held-out prompts, with 95 % intervals.

python -m stagekit.recipes.held_out runs/rlvr/02-grpo
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stagekit.errors import ConfigError


_Z = 1.959964
_YES_OR_NO = frozenset({"exact", "numeric", "maths", "regex", "json_schema", "format", "think_format_reward"})
"""Rewards that are 0 or 1, so that their mean is a share."""


class Measured(NamedTuple):
    """A reward's mean over the held-out prompts, at the first evaluation and at the last."""

    name: str
    first: float
    last: float
    first_spread: float = 0.0
    """Standard deviation of the single rewards."""
    last_spread: float = 0.0
    is_share: bool = False
    """Whether the single rewards are 0 or 1."""


def measured(folder: Path) -> list[Measured]:
    """The rewards of a stage's first and last evaluation, from its folder.

    Raises:
        ConfigError: there are not two evaluations.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl; give the folder of a stage, for instance runs/rlvr/02-grpo")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if "eval_reward" in line]
    if len(found) < 2:
        raise ConfigError(
            f"{path} has {len(found)} evaluations with rewards; set evaluation_steps and trl.eval_on_start"
        )
    names = [key for key in found[0] if key.startswith("eval_reward") and key.endswith(("/mean", "_reward"))]
    shares = _shares(folder)
    return [_between(name, found[0], found[-1], name.removeprefix("eval_") in shares) for name in names]


def _between(name: str, first: Mapping[str, float], last: Mapping[str, float], is_share: bool) -> Measured:
    spread = f"{name.removesuffix('/mean')}/std" if name.endswith("/mean") else f"{name}_std"
    return Measured(
        name.removeprefix("eval_"), first[name], last[name], first.get(spread, 0.0), last.get(spread, 0.0), is_share
    )


def _shares(folder: Path) -> set[str]:
    """The logged names of the rewards that are 0 or 1, by what the stage declared."""
    path = folder / "stage.yaml"
    if not path.is_file():
        return set()
    rewards = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]["reward"]
    named = {_name(one): one["source"].rpartition(":")[2] in _YES_OR_NO for one in rewards}
    found = {f"rewards/{name}/mean" for name, is_share in named.items() if is_share}
    counted = [one for one in rewards if one.get("weight", 1.0) != 0]
    if len(counted) == 1 and counted[0].get("weight", 1.0) == 1 and named[_name(counted[0])]:
        found.add("reward")
    return found


def _name(reward: Mapping[str, Any]) -> str:
    return str(reward.get("name") or reward["source"].rpartition(":")[2])


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` answers.

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    centre = (share + _Z * _Z / (2 * count)) / (1 + _Z * _Z / count)
    half = _Z / (1 + _Z * _Z / count) * math.sqrt(share * (1 - share) / count + _Z * _Z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(mean: float, spread: float, count: int) -> tuple[float, float]:
    """The normal 95 % interval of the mean of `count` rewards with this standard deviation.

    A trainer logs the standard deviation as the mean of those of its batches, so that it lacks what batches differ by.
    """
    half = _Z * spread / math.sqrt(count)
    return mean - half, mean + half


def told(folder: Path, count: int = 64) -> list[str]:
    """A line for each reward: its mean at the start and at the end, each with its interval."""
    lines = []
    for one in measured(folder):
        said = []
        for mean, spread in ((one.first, one.first_spread), (one.last, one.last_spread)):
            low, high = interval(mean, count) if one.is_share else mean_interval(mean, spread, count)
            said.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"{one.name}: {said[0]} -> {said[1]}")
    return lines


def show(folder: Path, count: int = 64) -> None:
    """Print the lines under a head, or why there are none."""
    try:
        lines = told(folder, count)
    except ConfigError as error:
        lines = [str(error)]
    print(f"\nRewards on {count} held-out prompts, start -> end, with 95 % intervals:")
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    show(Path(sys.argv[1]), *(int(count) for count in sys.argv[2:3]))
