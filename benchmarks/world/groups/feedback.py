"""Labels by a judge: the base compares answers to the world's questions, once for DPO, or of its own in iterations.

The bases learnt to say which of two responses is better, so they judge their own answers. Controls are a judge that
tosses a coin and one that is always wrong.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.world import rows
from benchmarks.world.method import Data, MakeData, Method
from benchmarks.world.world import World


PROMPTS = {"ai_feedback": 1600, "self_rewarding": 800}
"""Two answers to each prompt, or four in each of two iterations."""
HELD_OUT = 400
JUDGED = ("held_out/judge/accuracy", "judge/accuracy", "iteration_1/judge/accuracy", "judge/orders_agree")


def _prompts(n: int) -> MakeData:
    def data(world: World) -> Data:
        return {"rows": rows.prompts(world, n), "pairs": rows.preferences(world, HELD_OUT, split="dev")}

    return data


def _judge(result: Any, world: World, base: Path, setup: Any) -> Mapping[str, Any]:
    """How often the judge was right on pairs that are all the right way round, and how much it left."""
    stage = result.stages[0]
    return {
        "judge": {name: stage.metrics[name] for name in JUDGED if name in stage.metrics},
        "dropped": dict(stage.samples_dropped),
        "pairs": len(Path(stage.dataset("preferences")).read_text(encoding="utf-8").splitlines()),
    }


def _row(name: str, pipeline: str, judge: str | None = None, note: str = "") -> Method:
    stage = {"ai_feedback": "feedback", "self_rewarding": "self-rewarding"}[pipeline]
    data = (f"stages.{stage}.training_data={{rows}}", f"stages.{stage}.validation_data={{pairs}}")
    chosen = () if judge is None else (f"stages.{stage}.method.judge=benchmarks.world.judges:{judge}",)
    control = f"{name}-coin" if judge is None else None
    own = name if judge is None else f"{name}-{judge}"
    return Method(
        own, "feedback", pipeline, _prompts(PROMPTS[pipeline]), (*data, *chosen), control, extra=_judge, note=note
    )


COIN = "a judge that tosses a coin for each pair: no signal"
WRONG = "a judge that always prefers the worse response: it must do harm"

ROWS = (
    _row("ai-feedback", "ai_feedback"),
    _row("ai-feedback", "ai_feedback", "coin", COIN),
    _row("ai-feedback", "ai_feedback", "wrong", WRONG),
    _row("self-rewarding", "self_rewarding"),
    _row("self-rewarding", "self_rewarding", "coin", COIN),
    _row("self-rewarding", "self_rewarding", "wrong", WRONG),
)
