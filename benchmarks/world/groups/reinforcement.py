"""Learning from rewards: PPO, GRPO, RLOO and online DPO, all with the world's own score.

Every control is the same method with the scores of a batch dealt out in a drawn order: the same distribution, and no
knowledge of which answer was good.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.world import rows
from benchmarks.world.method import MakeData, Method
from benchmarks.world.world import World


SHUFFLED = "scores that are dealt out anew in each batch: no signal, so what it gains or loses is not from rewards"


def _prompts(n: int) -> MakeData:
    return lambda world: {"rows": rows.prompts(world, n)}


def curve(result: Any, world: World, base: Path, setup: Any) -> Mapping[str, Any]:
    """The mean score of each rollout's completions, as they were sampled. A control's are dealt out, so their mean is
    that of its completions too."""
    lines = (result.folder / f"01-{result.stages[-1].name}" / "metrics.jsonl").read_text(encoding="utf-8")
    found = [line["reward"] for line in map(json.loads, lines.splitlines()) if "reward" in line]
    return {"curve": found}


def _both(name: str, prompts: int) -> tuple[Method, Method]:
    stage = f"stages.{name}"
    data, training = _prompts(prompts), f"{stage}.training_data={{rows}}"
    return (
        Method(name, "rl", name, data, (training,), f"{name}-shuffled", extra=curve),
        Method(f"{name}-shuffled", "rl", name, data,
               (training, f"{stage}.method.reward=benchmarks.world.reward:shuffled"), extra=curve, note=SHUFFLED),
    )  # fmt: skip


ROWS = (*_both("ppo", 2560), *_both("grpo", 768), *_both("rloo", 768), *_both("online_dpo", 3072))
