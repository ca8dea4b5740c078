"""The stage types: one file each, and their union. A new type is one file here and one name below."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from stagekit.adapters.ai_feedback import AIFeedback
from stagekit.adapters.base import Method
from stagekit.adapters.constitutional import Constitutional
from stagekit.adapters.custom import Custom
from stagekit.adapters.distillation import Distillation
from stagekit.adapters.dpo import DPO
from stagekit.adapters.evaluation import Evaluation
from stagekit.adapters.grpo import GRPO
from stagekit.adapters.kto import KTO
from stagekit.adapters.online_dpo import OnlineDPO
from stagekit.adapters.ppo import PPO
from stagekit.adapters.process_reward import ProcessReward
from stagekit.adapters.reference_free import CPO, ORPO, SimPO
from stagekit.adapters.rejection_sampling import RejectionSampling
from stagekit.adapters.reward import Reward
from stagekit.adapters.rloo import RLOO
from stagekit.adapters.self_play import SelfPlay
from stagekit.adapters.self_rewarding import SelfRewarding
from stagekit.adapters.sft import SFT
from stagekit.adapters.synthetic_data import SyntheticData
from stagekit.options import nearest, shown


AnyMethod = (
    SFT | DPO | KTO | ORPO | CPO | SimPO | Reward | ProcessReward | PPO | GRPO | RLOO | OnlineDPO
    | Constitutional | AIFeedback
    | RejectionSampling | SelfPlay | SelfRewarding | Distillation | SyntheticData
    | Evaluation | Custom
)  # fmt: skip

PLANNED = ("merge",)
"""Stage types that have a name and nothing else yet."""

METHODS: dict[str, type[Method]] = {cls.model_fields["type"].default: cls for cls in AnyMethod.__args__}
"""Every stage type by its name."""

BUILT = tuple(name for name, cls in METHODS.items() if cls.missing is None)
"""Those that run."""


def _by_name(value: Any) -> Any:
    """`method: dpo` is `method: {type: dpo}`; an unknown type is told with the nearest one."""
    given = {"type": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping | Method):
        text = f"a method is a stage type's name or a mapping with type, not {shown(value)}"
        raise PydanticCustomError("stagekit", "{text}", {"text": text})
    if isinstance(given, Mapping):
        tag = given.get("type")
        if isinstance(tag, str) and tag in PLANNED:
            text = f"{tag!r} is planned, but not built yet; built are {', '.join(BUILT)}"
            raise PydanticCustomError("stagekit", "{text}", {"text": text})
        if tag is None:
            text = f"a method says its type: {{type: dpo, ...}}; known are {', '.join(METHODS)}"
            raise PydanticCustomError("stagekit", "{text}", {"text": text})
        if not isinstance(tag, str) or tag not in METHODS:
            close = nearest(tag, METHODS) if isinstance(tag, str) else None
            hint = f"did you mean {close!r}?" if close else f"known are {', '.join(METHODS)}"
            raise PydanticCustomError("stagekit", "{text}", {"text": f"unknown stage type {shown(tag)}; {hint}"})
    return given


MethodField = Annotated[AnyMethod, Field(discriminator="type"), BeforeValidator(_by_name)]
"""The stage type as an option: an object, or its name alone."""
