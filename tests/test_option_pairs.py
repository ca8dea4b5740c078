"""For every option and every stage type: the option does something there, or setting it is refused by its name.

Which type carries which option is the hand-written column `stage_types` of `docs/options.csv`; where a value comes out
is the hand-written table `EMITTED` of `tests/option_pairs.py`. Nothing here is derived from the code under test.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import ConfigError, TrainingStage
from stagekit.adapters import BUILT, METHODS
from stagekit.errors import Problem
from stagekit.flat import default_of
from stagekit.pending import PENDING
from tests.every_option import Case, curve
from tests.option_pairs import (
    EMITTED,
    OF_KIND,
    SAMPLING,
    VOWELS,
    Place,
    die,
    emission,
    part_of,
    remember_the_call,
    write_files,
)
from tests.test_every_option import CASES, TABLE, VALIDATED, constant_metric


CARRIERS = {row["flat_name"]: row["stage_types"].split() for row in TABLE}
SELECTORS = ("stage_type", "fine_tuning_method", "preference_loss_type")
FP16 = {"use_mixed_precision": True, "mixed_precision_dtype": "fp16"}
OWN_METRIC = {**VALIDATED, "custom_evaluation_function": constant_metric}

PAIRED = {"grpo_group_size": 2}
TIED = {"kl_penalty_coefficient": 0.1}
MEASURED = {"model": "other", **VALIDATED}
DRAWN = {"training_data": "rows", "max_training_samples": 4}

HERE: Mapping[str, Case] = {
    "callbacks": Case({}, {"callbacks": {"on_stage_start": remember_the_call}}, curve),
    "initial_loss_scale": Case({"initial_loss_scale": 2.0}, {"initial_loss_scale": 1024.0}, curve, FP16),
    "metrics_to_track": Case(
        {"metrics_to_track": ["loss"]}, {"metrics_to_track": ["loss", "mine"]}, curve, OWN_METRIC
    ),
    "min_learning_rate": Case({"min_learning_rate": 0.0}, {"min_learning_rate": 5e-4}, curve, {"learning_rate": 1e-3}),
    "preference_label_smoothing": Case(
        {"preference_label_smoothing": 0.1}, {"preference_label_smoothing": 0.3}, curve
    ),
    "reward_model": Case(
        {"reward_model": "tests.answers:by_length"}, {"reward_model": "tests.answers:by_shortness"}, curve
    ),
    "validation_data": Case({"validation_data": "rows"}, {"validation_data": "validation"}, curve),
}
"""Cases that are of every type that carries the option; those of `test_every_option` are of one."""

BESIDE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("preference_label_smoothing", "dpo"): {"method": {"type": "dpo", "loss": "conservative"}},
    ("custom_training_function", "custom"): {"method": "custom"},
    ("is_evaluation_only", "reward"): MEASURED,
    ("is_evaluation_only", "process_reward"): MEASURED,
    ("batch_size", "grpo"): PAIRED,
    ("batch_size", "rloo"): {"method": {"type": "rloo", "group_size": 2}},
    ("update_reference_model", "grpo"): TIED,
    ("reference_model_update_interval", "grpo"): {"update_reference_model": True, **TIED},
    ("data_preprocessor", "custom"): {"training_data": "rows"},
    ("max_training_samples", "custom"): {"training_data": "rows"},
    ("shuffle_data", "custom"): DRAWN,
    ("shuffle_data", "ai_feedback"): DRAWN,
    ("data_shuffle_seed", "custom"): DRAWN,
    ("shuffle_data", "synthetic_data"): DRAWN,
    ("data_shuffle_seed", "synthetic_data"): DRAWN,
    ("data_shuffle_seed", "ai_feedback"): DRAWN,
}
"""What must stand beside an option on one type, instead of what the case says."""

PAIRS = [(name, kind) for name in EMITTED for kind in BUILT]
APPLYING = [pair for pair in PAIRS if pair[1] in CARRIERS[pair[0]]]
OTHERS = [pair for pair in PAIRS if pair[1] not in CARRIERS[pair[0]]]


def ids(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{name}-{kind}" for name, kind in pairs]


def case_of(name: str, kind: str) -> Case:
    case = HERE.get(name) or CASES[name]
    return Case(case.a, case.b, case.observe, BESIDE.get((name, kind), case.shared), kind)


@pytest.fixture
def place(tmp_path: Path, tiny_model_path: str, sft_rows: list[Any], preference_rows: list[Any]) -> Place:
    return Place(tmp_path / "run", tiny_model_path, write_files(tmp_path, sft_rows, preference_rows))


@pytest.mark.parametrize(("name", "kind"), APPLYING, ids=ids(APPLYING))
def test_the_two_values_of_an_option_are_two_emissions_of_a_type_that_carries_it(
    name: str, kind: str, place: Place
) -> None:
    case, part = case_of(name, kind), part_of(name, kind)
    ends = {"data_preprocessor": die} if part.startswith("begun") else {}
    first, second = (emission(place, place.stage(kind, case, given, **ends), part) for given in (case.a, case.b))
    assert first != second, f"{part} is {str(first)[:300]} for {dict(case.a)} and for {dict(case.b)}"


@pytest.mark.parametrize(
    ("name", "kind"), [("learning_rate", "dpo"), ("lora_rank", "sft"), ("frozen_layers", "reward"),
                       ("early_stopping", "kto"), ("shuffle_data", "kto"), ("tags", "evaluation"),
                       ("random_seed", "custom"), ("critique_model", "constitutional"), ("use_reference_model", "dpo")]
)  # fmt: skip
def test_the_same_value_twice_is_one_emission(name: str, kind: str, place: Place) -> None:
    """One of each kind of part: what differs above is the option, not the moment."""
    case, part = case_of(name, kind), part_of(name, kind)
    ends = {"data_preprocessor": die} if part.startswith("begun") else {}
    first, second = (emission(place, place.stage(kind, case, case.b, **ends), part) for _ in range(2))
    assert first == second


def refused(place: Place, name: str, kind: str, given: Mapping[str, Any]) -> list[Problem]:
    """The problems of a value of the option on the type; none where it is accepted."""
    try:
        place.stage(kind, case_of(name, kind), given)
    except ConfigError as error:
        return list(error.problems)
    return []


def way_out(name: str, kind: str) -> tuple[str, ...]:
    """What a refusal has to say of how or where the option can be had: one of these."""
    if path_of(name).startswith("method."):
        return ("belongs to",)
    if kind == "custom":
        return ("through metadata",)
    if kind == "synthetic_data":
        return ("put it on the stage that learns",)
    if kind == "evaluation" or (kind == "ai_feedback" and name != "is_evaluation_only"):
        return ("put it on the stage that does", "validation_data", "without training")
    return {
        "custom_loss_function": ("sft and constitutional",),
        "distributed_strategy": ("put an sft stage on", "leave it out"),
        "share_reference_model": ("leave it out", "dpo, kto"),
        "is_evaluation_only": ("use method: evaluation", "measure with a stage of type evaluation"),
        "use_reference_model": ("use simpo or orpo", "leave it out")
        if kind in {"kto", "online_dpo"}
        else ("dpo, kto",),
    }.get(name, ("dpo, kto",))


def path_of(name: str) -> str:
    return next(row["path"] for row in TABLE if row["flat_name"] == name)


@pytest.mark.parametrize(("name", "kind"), OTHERS, ids=ids(OTHERS))
def test_an_option_that_a_type_does_not_carry_is_refused_by_its_name_with_the_way_out(
    name: str, kind: str, place: Place
) -> None:
    case = case_of(name, kind)
    says = [given for given in (case.a, case.b) if given.get(name) not in (None, [], {})]
    told = [refused(place, name, kind, given) for given in says]
    assert any(told), "every value is accepted"
    for given, problems in zip(says, told, strict=True):
        if not problems:
            assert given[name] == default_of(name), "only what happens anyway may be said"
            continue
        own = [one.message for one in problems if one.path in {name, *SWITCHES.get(name, ())}]
        assert own, f"refused without naming {name}: {problems}"
        assert any(way in message for message in own for way in way_out(name, kind)), own
        if path_of(name).startswith("method."):
            assert all(carrier in own[0] for carrier in CARRIERS[name])


SWITCHES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "merge_lora_after_training"), ("use_lora",)
    ),
    "qlora_bits": ("use_qlora",),
    "reference_model_update_interval": ("update_reference_model",),
}
"""Options that stand beside a switch; where that is refused, they are not looked at."""


NAMES: Mapping[str, Mapping[str, str]] = {
    "stage_type": {
        "sft": "supervised_fine_tuning", "dpo": "preference_optimization", "kto": "preference_optimization",
        "orpo": "odds_ratio_preference", "cpo": "contrastive_preference", "simpo": "contrastive_preference",
        "reward": "reward_model_training", "process_reward": "process_reward_model_training",
        "ppo": "proximal_policy_optimization", "grpo": "group_relative_policy_optimization",
        "rloo": "reinforcement_learning", "online_dpo": "reinforcement_learning",
        "rejection_sampling": "rejection_sampling", "self_play": "self_play", "self_rewarding": "self_rewarding",
        "ai_feedback": "reinforcement_learning_ai_feedback",
        "constitutional": "constitutional", "distillation": "knowledge_distillation", "evaluation": "evaluation",
        "custom": "custom", "synthetic_data": "synthetic_data_training",
    },
    "fine_tuning_method": {
        "sft": "sft", "dpo": "ipo", "kto": "kto", "orpo": "orpo", "cpo": "cpo", "simpo": "simpo",
        "ppo": "ppo", "grpo": "grpo", "rloo": "reinforce",
        "rejection_sampling": "rso", "self_play": "spin",
        "constitutional": "constitutional_ai", "distillation": "knowledge_distillation",
    },
    "preference_loss_type": {"dpo": "hinge", "kto": "kto", "orpo": "odds_ratio", "simpo": "simple"},
}  # fmt: skip
"""Selector -> stage type -> a value that names it, or one of its losses."""
BY_ITSELF = {"kto": "dpo", "simpo": "cpo", "rloo": "ppo", "online_dpo": "ppo", "ai_feedback": "ppo"}
"""What `stage_type` alone selects, where another selector has to say which."""
ALSO = {"online_dpo": ("ppo", "grpo", "rloo"), "ai_feedback": ("ppo", "grpo", "rloo")}
"""Types that the same `stage_type` may be, of which another selector says which."""

SELECTED = [(name, kind) for name in SELECTORS for kind in BUILT]


def selected(place: Place, kind: str, **selectors: str) -> tuple[str, Any]:
    """The type that the selectors choose, with its trainer and its loss."""
    least = place.least(kind)
    own = {
        "custom": {"custom_training_function": "tests.option_pairs:tell"},
        "distillation": {"teacher_model": place.model},
        **{name: {"reward_model": VOWELS} for name in (*SAMPLING, "rejection_sampling", "ai_feedback")},
    }.get(kind, {})
    least = {key: place.files["rows"] for key in least if key.endswith("_data")}
    stage = TrainingStage(name="s", **least, **own, **selectors)
    return stage.method.type, (stage.method.trainer_for(stage), emission(place, stage, "argument loss_type"))


@pytest.mark.parametrize(("name", "kind"), SELECTED, ids=ids(SELECTED))
def test_a_selector_selects_the_types_that_carry_it_and_contradicts_the_others(
    name: str, kind: str, place: Place
) -> None:
    assert set(NAMES[name]) == set(CARRIERS[name])
    if kind not in CARRIERS[name]:
        for other, value in NAMES[name].items():
            if BY_ITSELF.get(other) == kind or other in ALSO.get(
                kind, ()
            ):  # one stage_type of two types, of which the value is the other
                assert selected(place, kind, stage_type=NAMES["stage_type"][kind], **{name: value})[0] == other
                continue
            with pytest.raises(ConfigError, match=f"{name}: the selectors contradict each other"):
                selected(place, kind, stage_type=NAMES["stage_type"][kind], **{name: value})
    elif name == "stage_type":
        assert selected(place, kind, stage_type=NAMES[name][kind])[0] == BY_ITSELF.get(kind, kind)
    else:
        chosen = selected(place, kind, **{name: NAMES[name][kind]})
        assert chosen[0] == kind
        without = {"supervised_fine_tuning", "preference_optimization"} - {NAMES["stage_type"].get(kind)}
        for other in sorted(without):
            assert chosen != selected(place, "sft", stage_type=other)


@pytest.mark.parametrize("kind", BUILT)
def test_loss_scaling_is_never_switched_off(kind: str, place: Place) -> None:
    """Torch has no constant scale: true says what happens anyway, under fp16 alone; false is refused everywhere."""
    carries = kind in CARRIERS["use_dynamic_loss_scaling"]
    precision = {} if kind == "custom" else FP16
    for value, accepted in ((True, carries), (False, False)):
        case = Case({}, {}, curve, precision)
        try:
            place.stage(kind, case, {"use_dynamic_loss_scaling": value})
        except ConfigError as error:
            assert not accepted
            messages = [one.message for one in error.problems if one.path == "use_dynamic_loss_scaling"]
            assert any("use bf16" in one for one in messages) or not carries
            assert messages
        else:
            assert accepted


WAITING = [(name, kind) for name in PENDING for kind in BUILT]


@pytest.mark.parametrize(("name", "kind"), WAITING, ids=ids(WAITING))
def test_an_option_that_is_not_built_is_refused_on_every_type(name: str, kind: str, place: Place) -> None:
    value = yaml.safe_load(next(row["value_b"] for row in TABLE if row["flat_name"] == name))
    with pytest.raises(ConfigError) as caught:
        place.stage(kind, Case({}, {}, curve), {name: value})
    assert {name, path_of(name)} & {one.path for one in caught.value.problems}


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind not in BUILT])
def test_a_type_that_is_not_built_carries_nothing(kind: str) -> None:
    for row in TABLE:
        if kind in row["stage_types"].split():
            assert row["flat_name"] in PENDING, f"{row['flat_name']} has no other type"
    with pytest.raises(ConfigError, match="is not built yet"):
        TrainingStage(name="s", method=kind, training_data="x.jsonl")


def test_the_tables_are_of_all_options() -> None:
    """An option that is built needs its line in `EMITTED` and its types in the column."""
    names = {row["flat_name"] for row in TABLE}
    assert set(EMITTED) | set(SELECTORS) | {"use_dynamic_loss_scaling"} | set(PENDING) == names
    assert not set(EMITTED) & set(PENDING)
    assert set(HERE) | {name for name, _ in [*BESIDE, *OF_KIND]} <= set(EMITTED)
    assert all(set(CARRIERS[name]) <= set(METHODS) for name in names)
