"""How the rewards of a stage began and ended on its held-out prompts, with a 95 % interval where they are shares.

python -m stagekit.recipes.held_out runs/rlvr/02-grpo
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from stagekit.errors import ConfigError


class Measured(NamedTuple):
    """A reward's mean over the held-out prompts, at the first evaluation and at the last."""

    name: str
    first: float
    last: float


def measured(folder: Path) -> list[Measured]:
    """The rewards of every evaluation of a stage's folder.

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
    return [Measured(name.removeprefix("eval_"), found[0][name], found[-1][name]) for name in names]


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` answers.

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def main(folder: Path, count: int = 64) -> None:
    """Print the table."""
    for one in measured(folder):
        said = [
            f"{value:.3f}" + (" ({:.3f} to {:.3f})".format(*interval(value, count)) if 0 <= value <= 1 else "")
            for value in (one.first, one.last)
        ]
        print(f"{one.name}: {said[0]} -> {said[1]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(count) for count in sys.argv[2:3]))
