"""The specification's three selectors (`stage_type`, `fine_tuning_method`, `preference_loss_type`) as one method.

The committed table of every enum value: what it selects here, or why it is refused. Several selectors must agree.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from stagekit.errors import Problem
from stagekit.options import nearest, shown


class Choice(NamedTuple):
    """What an enum value selects: stage types that it allows (the first is the default), options, tags."""

    types: tuple[str, ...]
    preset: Mapping[str, Any] = {}
    tags: tuple[str, ...] = ()


class Refused(NamedTuple):
    """An enum value that cannot be had, and the way out."""

    reason: str


_PREFERENCE = ("dpo", "kto", "orpo", "cpo", "simpo")
_RL = ("ppo", "grpo", "rloo", "online_dpo")
_LABEL = ("sft",)


def _label(*names: str) -> dict[str, Choice]:
    return {name: Choice(_LABEL, tags=(name,)) for name in names}


STAGE_TYPES: Mapping[str, Choice | Refused] = {
    "supervised_fine_tuning": Choice(("sft",)),
    **_label(
        "pre_training", "continued_pre_training", "instruction_tuning", "code_fine_tuning",
        "math_reasoning_fine_tuning", "chain_of_thought_training", "tool_use_training", "agentic_training",
        "long_context_training",
        "multi_turn_conversation", "curriculum_learning", "progressive_training", "warmup", "cooldown",
        "self_training", "response_distillation", "helpfulness_training", "honesty_training",
    ),
    "lora_adapter_training": Choice(("sft", "dpo"), tags=("lora_adapter_training",)),
    "preference_optimization": Choice(_PREFERENCE),
    "preference_ranking": Choice(_PREFERENCE, tags=("preference_ranking",)),
    "odds_ratio_preference": Choice(("orpo",)),
    "contrastive_preference": Choice(("cpo", "simpo")),
    "sequence_likelihood_calibration": Choice(("dpo",), {"loss": "hinge"}),
    "reinforcement_learning": Choice(_RL),
    "proximal_policy_optimization": Choice(("ppo",)),
    "group_relative_policy_optimization": Choice(("grpo",)),
    "reinforcement_learning_ai_feedback": Choice((*_RL, "ai_feedback"), tags=("ai_feedback",)),
    "reinforcement_learning_verifiable": Choice(("grpo", "rloo", "ppo"), tags=("verifiable_rewards",)),
    "reward_model_training": Choice(("reward",)),
    "outcome_reward_model_training": Choice(("reward",)),
    "process_reward_model_training": Choice(("process_reward",)),
    "constitutional": Choice(("constitutional",)),
    "safety_alignment": Choice(("constitutional", "dpo", "sft"), tags=("safety_alignment",)),
    "harmlessness_training": Choice(("constitutional", "dpo", "sft"), tags=("harmlessness_training",)),
    "red_teaming_training": Choice(("constitutional",), tags=("red_teaming_training",)),
    "jailbreak_resistance": Choice(("constitutional", "dpo", "sft"), tags=("jailbreak_resistance",)),
    "rejection_sampling": Choice(("rejection_sampling",)),
    "best_of_n_sampling": Choice(("rejection_sampling",)),
    "rank_responses": Choice(("rejection_sampling",), tags=("rank_responses",)),
    "self_play": Choice(("self_play",)),
    "self_rewarding": Choice(("self_rewarding",)),
    "knowledge_distillation": Choice(("distillation",)),
    "feature_distillation": Choice(("distillation",), {"hidden_states": True}),
    "synthetic_data_training": Choice(("synthetic_data",)),
    "adapter_merging": Choice(("merge",)),
    "model_merging": Choice(("merge",)),
    "evaluation": Choice(("evaluation",)),
    "checkpoint": Refused("every stage saves its result; see save_checkpoint_after and checkpoint_save_steps"),
    "custom": Choice(("custom",)),
    "prefix_tuning": Refused("prefix tuning is not supported; use lora"),
    "prompt_tuning": Refused("prompt tuning is not supported; use lora"),
    "vision_language_pre_training": Refused("stagekit trains text models; use TRL's SFTTrainer for vision"),
    "visual_instruction_tuning": Refused("stagekit trains text models; use TRL's SFTTrainer for vision"),
    "audio_language_alignment": Refused("stagekit trains text models"),
    "adversarial_training": Refused("no method of this name for language models in TRL; use red_teaming_training"),
}  # fmt: skip

FINE_TUNING_METHODS: Mapping[str, Choice | Refused] = {
    "sft": Choice(("sft",)),
    "dpo": Choice(("dpo",)),
    "ipo": Choice(("dpo",), {"loss": "ipo"}),
    "rdpo": Choice(("dpo",), {"loss": "robust"}),
    "apo": Choice(("dpo",), {"loss": "apo"}),
    "nca": Choice(("dpo",), {"loss": "nca"}),
    "safe_exo": Choice(("dpo",), {"loss": "exo"}),
    "slic_hf": Choice(("dpo",), {"loss": "hinge"}),
    "kto": Choice(("kto",)),
    "orpo": Choice(("orpo",)),
    "cpo": Choice(("cpo",)),
    "simpo": Choice(("simpo",)),
    "sim_po": Choice(("simpo",)),
    "rlhf": Choice(("ppo",)),
    "ppo": Choice(("ppo",)),
    "grpo": Choice(("grpo",)),
    "rlaif": Choice(("ppo", "grpo", "rloo", "online_dpo"), tags=("ai_feedback",)),
    "rlvr": Choice(("grpo", "rloo", "ppo"), tags=("verifiable_rewards",)),
    "reinforce": Choice(("rloo",)),
    "constitutional_ai": Choice(("constitutional",)),
    "spin": Choice(("self_play",)),
    "knowledge_distillation": Choice(("distillation",)),
    "rso": Choice(("rejection_sampling",)),
    "safe_nca": Refused("its safety term has no counterpart in TRL; use nca"),
    "tpo": Refused("TRL has it only as an experiment that may vanish; use dpo"),
    "cal_dpo": Refused("no trainer has it; use dpo with loss: ipo, which bounds the margin too"),
    "lcpo": Refused("no trainer has it; use simpo, which corrects for length"),
    "rrhf": Refused("no trainer has it; use rejection_sampling"),
    "pro": Refused("no trainer has rankings of more than two; use dpo on pairs"),
    "gapo": Refused("no trainer has it; use grpo"),
}

PREFERENCE_LOSSES: Mapping[str, Choice | Refused] = {
    "sigmoid": Choice(("dpo",), {"loss": "sigmoid"}),
    "hinge": Choice(("dpo",), {"loss": "hinge"}),
    "ipo": Choice(("dpo",), {"loss": "ipo"}),
    "robust": Choice(("dpo",), {"loss": "robust"}),
    "conservative": Choice(("dpo",), {"loss": "conservative"}),
    "odds_ratio": Choice(("orpo",)),
    "simple": Choice(("simpo",)),
    "kto": Choice(("kto",)),
}

TABLES = {
    "stage_type": STAGE_TYPES,
    "fine_tuning_method": FINE_TUNING_METHODS,
    "preference_loss_type": PREFERENCE_LOSSES,
}

TYPE_NAMES: Mapping[str, str] = {
    "sft": "supervised_fine_tuning",
    "dpo": "preference_optimization",
    "kto": "preference_optimization",
    "orpo": "odds_ratio_preference",
    "cpo": "contrastive_preference",
    "simpo": "contrastive_preference",
    "reward": "reward_model_training",
    "process_reward": "process_reward_model_training",
    "ppo": "proximal_policy_optimization",
    "grpo": "group_relative_policy_optimization",
    "rloo": "reinforcement_learning",
    "online_dpo": "reinforcement_learning",
    "constitutional": "constitutional",
    "ai_feedback": "reinforcement_learning_ai_feedback",
    "rejection_sampling": "rejection_sampling",
    "self_play": "self_play",
    "self_rewarding": "self_rewarding",
    "distillation": "knowledge_distillation",
    "synthetic_data": "synthetic_data_training",
    "evaluation": "evaluation",
    "custom": "custom",
}
"""Which `stage_type` says a stage type, for `to_flat`."""

FINE_TUNING_NAMES: Mapping[str, str] = {
    "sft": "sft",
    "dpo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "cpo": "cpo",
    "simpo": "simpo",
    "ppo": "ppo",
    "grpo": "grpo",
    "rloo": "reinforce",
    "constitutional": "constitutional_ai",
    "rejection_sampling": "rso",
    "self_play": "spin",
    "distillation": "knowledge_distillation",
}
"""Which `fine_tuning_method` says a stage type, for `to_flat`; the others have none."""

METHOD_NAMES: Mapping[str, str] = {kind: FINE_TUNING_NAMES[kind] for kind in ("kto", "simpo", "rloo")}
"""Those needed beside `stage_type`, because that alone would select another type."""

PREFERENCE_NAMES: Mapping[str, str] = {"kto": "kto", "orpo": "odds_ratio", "simpo": "simple"}
"""Which `preference_loss_type` says a stage type that is one loss."""

DPO_LOSS_NAMES: Mapping[str, tuple[str, str]] = {
    **{loss: ("preference_loss_type", loss) for loss in ("sigmoid", "hinge", "ipo", "robust", "conservative")},
    "nca": ("fine_tuning_method", "nca"),
    "apo": ("fine_tuning_method", "apo"),
    "exo": ("fine_tuning_method", "safe_exo"),
}
"""How `to_flat` says a loss of dpo; a loss that is not here has no flat name."""


def select(given: Mapping[str, Any]) -> tuple[dict[str, Any] | None, tuple[str, ...], list[Problem]]:
    """The method dict and the tags that the three selectors in `given` agree on; None without agreement."""
    problems: list[Problem] = []
    choices: list[tuple[str, Choice]] = []
    for name, table in TABLES.items():
        value = given.get(name)
        if value is None:
            continue
        choice = table.get(value) if isinstance(value, str) else None
        if choice is None:
            problems.append(Problem(name, f"unknown value {shown(value)}; {_hint(name, value)}"))
        elif isinstance(choice, Refused):
            problems.append(Problem(name, f"{value!r} cannot be had: {choice.reason}"))
        else:
            choices.append((name, choice))
    if problems or not choices:
        return None, (), problems
    agreed = [kind for kind in _narrowest(choices) if all(kind in choice.types for _, choice in choices)]
    if not agreed:
        said = ", ".join(f"{name} {given[name]!r} means {' or '.join(choice.types)}" for name, choice in choices)
        return None, (), [Problem(choices[-1][0], f"the selectors contradict each other: {said}; keep one of them")]
    preset: dict[str, Any] = {}
    for name, choice in choices:
        for key, value in choice.preset.items():
            if preset.setdefault(key, value) != value:
                return None, (), [Problem(name, f"contradicts another selector: {key} {value!r} or {preset[key]!r}?")]
    tags = tuple(tag for _, choice in choices for tag in choice.tags)
    return {"type": agreed[0], **preset}, tags, []


def _hint(name: str, value: Any) -> str:
    """The selector that has the value, the nearest value, or where all are listed."""
    for other, table in TABLES.items():
        if isinstance(value, str) and other != name and value in table:
            return f"it is a value of {other}"
    close = nearest(value, TABLES[name]) if isinstance(value, str) else None
    known = ", ".join(sorted(TABLES[name]))
    if close is None and len(known) > 300:
        return "docs/parity.md lists the values; or write method: TYPE"
    return f"did you mean {close!r}?" if close else f"known are {known}"


def _narrowest(choices: Iterable[tuple[str, Choice]]) -> tuple[str, ...]:
    return min((choice.types for _, choice in choices), key=len)
