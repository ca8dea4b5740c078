"""The gate of a stage: whether its result is passed on."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stagekit.errors import StageError
from stagekit.job import Outcome


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


def through_gate(stage: "TrainingStage", outcome: Outcome) -> tuple[Outcome, str]:
    """The outcome as it is passed on, and why its model is not; empty where it is.

    Raises:
        StageError: the metric was not measured; or it is out of bounds, and the gate says `stop`.
    """
    gate = stage.gate
    if gate is None:
        return outcome, ""
    key = _key(stage, gate.metric, outcome.metrics)
    value = outcome.metrics[key]
    if gate.at_least is not None:
        holds, bound = value >= gate.at_least, f"at least {gate.at_least:g}"
    else:
        assert gate.at_most is not None
        holds, bound = value <= gate.at_most, f"at most {gate.at_most:g}"
    if holds:
        return outcome, ""
    why = f"gate: {key} is {value:.6g}, and must be {bound}"
    if gate.otherwise == "stop":
        raise StageError(f"stage {stage.name!r}: {why}. Its model is not passed on, and the run stops here")
    artifacts = dict(outcome.artifacts)
    if "policy" in artifacts:
        artifacts["held_back"] = artifacts.pop("policy")
    before = f"{outcome.stopped}; " if outcome.stopped else ""
    return dataclasses.replace(outcome, artifacts=artifacts), f"{before}{why}; the model before it is passed on"


def _key(stage: "TrainingStage", metric: str, metrics: Mapping[str, float]) -> str:
    short = metric.removeprefix("eval_")
    for key in (metric, stage.method.metric_keys.get(short) or "", f"eval_{short}"):
        if key in metrics:
            return key
    have = ", ".join(sorted(metrics)) or "none"
    raise StageError(f"stage {stage.name!r}: gate.metric: no metric {metric!r} was measured; there are: {have}")
