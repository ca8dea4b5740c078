"""The stage types: one file each, and their union. A new type is one file here and one name below."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stagekit.adapters.base import Method
from stagekit.adapters.constitutional import Constitutional
from stagekit.adapters.custom import Custom
from stagekit.adapters.dpo import DPO
from stagekit.adapters.evaluation import Evaluation
from stagekit.adapters.sft import SFT
from stagekit.adapters.unbuilt import (
    CPO,
    GRPO,
    KTO,
    ORPO,
    PPO,
    RLOO,
    Distillation,
    ProcessReward,
    RejectionSampling,
    Reward,
    SelfPlay,
    SimPO,
)
from stagekit.options import nearest


AnyMethod = (
    SFT | DPO | KTO | ORPO | CPO | SimPO | Reward | ProcessReward | PPO | GRPO | RLOO | Constitutional
    | RejectionSampling | SelfPlay | Distillation | Evaluation | Custom
)  # fmt: skip

METHODS: dict[str, type[Method]] = {cls.model_fields["type"].default: cls for cls in AnyMethod.__args__}
"""Every stage type by its name."""


def _by_name(value: Any) -> Any:
    """`method: dpo` is `method: {type: dpo}`; an unknown type is told with the nearest one."""
    given = {"type": value} if isinstance(value, str) else value
    if isinstance(given, dict):
        tag = given.get("type")
        if not isinstance(tag, str) or tag not in METHODS:
            close = nearest(tag, METHODS) if isinstance(tag, str) else None
            hint = f"did you mean {close!r}?" if close else f"known are {', '.join(METHODS)}"
            raise PydanticCustomError("stagekit", "{text}", {"text": f"unknown stage type {tag!r}; {hint}"})
    return given


MethodField = Annotated[AnyMethod, Field(discriminator="type"), BeforeValidator(_by_name)]
"""The stage type as an option: an object, or its name alone."""
