"""The specification's enums: every value selects something, or says why it cannot."""

import pytest

from stagekit import ConfigError, TrainingStage
from stagekit.adapters import BUILT, METHODS, PLANNED
from stagekit.selectors import (
    DPO_LOSS_NAMES,
    FINE_TUNING_METHODS,
    FINE_TUNING_NAMES,
    PREFERENCE_LOSSES,
    PREFERENCE_NAMES,
    STAGE_TYPES,
    TABLES,
    TYPE_NAMES,
    Choice,
    Refused,
    select,
)


STAGE_TYPE_VALUES = [
    "pre_training",
    "continued_pre_training",
    "supervised_fine_tuning",
    "instruction_tuning",
    "preference_optimization",
    "odds_ratio_preference",
    "contrastive_preference",
    "reinforcement_learning",
    "proximal_policy_optimization",
    "group_relative_policy_optimization",
    "reinforcement_learning_ai_feedback",
    "reinforcement_learning_verifiable",
    "reward_model_training",
    "process_reward_model_training",
    "outcome_reward_model_training",
    "constitutional",
    "safety_alignment",
    "harmlessness_training",
    "helpfulness_training",
    "honesty_training",
    "rejection_sampling",
    "rank_responses",
    "sequence_likelihood_calibration",
    "preference_ranking",
    "best_of_n_sampling",
    "self_play",
    "self_training",
    "self_rewarding",
    "knowledge_distillation",
    "response_distillation",
    "feature_distillation",
    "synthetic_data_training",
    "lora_adapter_training",
    "adapter_merging",
    "prefix_tuning",
    "prompt_tuning",
    "vision_language_pre_training",
    "visual_instruction_tuning",
    "audio_language_alignment",
    "code_fine_tuning",
    "math_reasoning_fine_tuning",
    "chain_of_thought_training",
    "tool_use_training",
    "agentic_training",
    "long_context_training",
    "multi_turn_conversation",
    "curriculum_learning",
    "progressive_training",
    "warmup",
    "cooldown",
    "adversarial_training",
    "red_teaming_training",
    "jailbreak_resistance",
    "evaluation",
    "checkpoint",
    "model_merging",
    "custom",
]
"""TrainingStageType, in snake case."""

FINE_TUNING_METHOD_VALUES = [
    "sft",
    "rlhf",
    "ppo",
    "grpo",
    "rlaif",
    "rlvr",
    "reinforce",
    "dpo",
    "ipo",
    "kto",
    "simpo",
    "cpo",
    "rdpo",
    "cal_dpo",
    "tpo",
    "apo",
    "lcpo",
    "orpo",
    "rso",
    "rrhf",
    "slic_hf",
    "nca",
    "safe_nca",
    "pro",
    "constitutional_ai",
    "safe_exo",
    "spin",
    "knowledge_distillation",
    "gapo",
]
"""FineTuningMethodType, in snake case; SimPO is one word, as LoRA is."""

PREFERENCE_LOSS_VALUES = ["sigmoid", "hinge", "ipo", "robust", "conservative", "odds_ratio", "simple", "kto"]
"""PreferenceLossType, in snake case."""

ROWS = [(name, value, choice) for name, table in TABLES.items() for value, choice in table.items()]


def test_the_tables_hold_exactly_the_specification_s_values() -> None:
    assert sorted(STAGE_TYPES) == sorted(STAGE_TYPE_VALUES)
    assert sorted(FINE_TUNING_METHODS) == sorted([*FINE_TUNING_METHOD_VALUES, "sim_po"])
    assert sorted(PREFERENCE_LOSSES) == sorted(PREFERENCE_LOSS_VALUES)


@pytest.mark.parametrize(("name", "value", "choice"), ROWS)
def test_a_value_selects_a_known_type_with_known_options_or_says_why_not(
    name: str, value: str, choice: Choice | Refused
) -> None:
    if isinstance(choice, Refused):
        assert len(choice.reason.split()) >= 4
        method, tags, problems = select({name: value})
        assert (method, tags) == (None, ())
        assert [(one.path, one.message) for one in problems] == [(name, f"{value!r} cannot be had: {choice.reason}")]
        return
    assert choice.types
    assert set(choice.types) <= {*METHODS, *PLANNED}
    if choice.types[0] in METHODS:
        for key, item in choice.preset.items():
            assert METHODS[choice.types[0]].__pydantic_validator__.validate_python({key: item}) is not None
    assert select({name: value}) == ({"type": choice.types[0], **choice.preset}, choice.tags, [])


@pytest.mark.parametrize(
    ("name", "value", "type_"),
    [(name, value, choice.types[0]) for name, value, choice in ROWS if isinstance(choice, Choice)],
)
def test_a_value_makes_a_stage_or_says_that_its_type_is_not_built(name: str, value: str, type_: str) -> None:
    given = {"name": "a", name: value}
    if type_ == "evaluation":
        given["validation_data"] = "x.jsonl"
    elif type_ == "custom":
        given["custom_training_function"] = "pkg.mod:f"
    else:
        given["training_data"] = "x.jsonl"
    if type_ == "distillation":
        given["teacher_model"] = "a/teacher"
    if type_ in {"ppo", "grpo", "rloo"}:
        given["reward_model"] = "stage:rm"
    if type_ == "rejection_sampling":
        given["reward_model"] = "pkg.mod:f"
    preset = TABLES[name][value].preset  # type: ignore[union-attr]
    if preset.get("loss") in {"robust", "conservative", "exo"}:
        given["preference_label_smoothing"] = 0.1
    if type_ in BUILT:
        assert TrainingStage(**given).method.type == type_
        return
    with pytest.raises(ConfigError, match="not built yet"):
        TrainingStage(**given)


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"stage_type": "dpo"}, "stage_type", "unknown value 'dpo'; it is a value of fine_tuning_method"),
        ({"fine_tuning_method": "dppo"}, "fine_tuning_method", "unknown value 'dppo'; did you mean 'ppo'?"),
        ({"stage_type": "zzz"}, "stage_type",
         "unknown value 'zzz'; docs/parity.md lists the values; or write method: TYPE"),
        ({"preference_loss_type": 5}, "preference_loss_type",
         "unknown value 5; known are conservative, hinge, ipo, kto, odds_ratio, robust, sigmoid, simple"),
        ({"stage_type": "constitutional", "fine_tuning_method": "kto"}, "fine_tuning_method",
         "the selectors contradict each other: stage_type 'constitutional' means constitutional, "
         "fine_tuning_method 'kto' means kto; keep one of them"),
    ],
)  # fmt: skip
def test_a_value_that_selects_nothing_is_told_with_the_way_out(
    given: dict[str, object], path: str, message: str
) -> None:
    method, _, problems = select(given)
    assert method is None
    assert [tuple(one) for one in problems] == [(path, message)]


def test_no_selector_selects_nothing() -> None:
    assert select({}) == (None, (), [])
    assert select({"stage_type": None}) == (None, (), [])


def test_the_names_that_to_flat_gives_select_the_type_they_stand_for() -> None:
    assert set(TYPE_NAMES) == set(METHODS)
    for kind, value in TYPE_NAMES.items():
        assert kind in STAGE_TYPES[value].types  # type: ignore[union-attr]
    for kind, value in FINE_TUNING_NAMES.items():
        assert FINE_TUNING_METHODS[value].types[0] == kind  # type: ignore[union-attr]
    for kind, value in PREFERENCE_NAMES.items():
        assert PREFERENCE_LOSSES[value] == Choice((kind,))
    for loss, (name, value) in DPO_LOSS_NAMES.items():
        assert TABLES[name][value] == Choice(("dpo",), {"loss": loss})
