"""A stage: flat and slot spelling, selectors that must agree, learning rates, durations, defaults of the slots."""

from datetime import timedelta
from typing import Any

import pytest

from stagekit import DPO, SFT, ConfigError, Constitutional, Custom, Evaluation, LoRA, Reference, TrainingStage
from stagekit.adapters import BUILT
from stagekit.stage_options import StageOptions


def stage(**given: Any) -> TrainingStage:
    return TrainingStage(**{"name": "a", "training_data": "rows.jsonl", **given})


def problems(**given: Any) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        stage(**given)
    return [(problem.path, problem.message) for problem in caught.value.problems]


def test_the_flat_spelling_is_the_slot_spelling() -> None:
    flat = TrainingStage(
        name="rl-cai",
        stage_type="preference_optimization",
        dpo_beta=0.1,
        use_lora=True,
        lora_rank=8,
        training_data="pairs.jsonl",
    )
    slots = TrainingStage(name="rl-cai", method=DPO(beta=0.1), lora=LoRA(rank=8), training_data="pairs.jsonl")
    assert flat == slots
    assert flat.only_set() == slots.only_set()
    assert repr(flat) == repr(slots)


@pytest.mark.parametrize(
    ("flat", "slots"),
    [
        ({"stage_type": "supervised_fine_tuning"}, {"method": "sft"}),
        ({"fine_tuning_method": "dpo", "preference_loss_type": "ipo"}, {"method": {"type": "dpo", "loss": "ipo"}}),
        ({"fine_tuning_method": "ipo"}, {"method": DPO(loss="ipo")}),
        ({"stage_type": "constitutional", "critique_revision_rounds": 4}, {"method": Constitutional(rounds=4)}),
        (
            {"stage_type": "constitutional", "constitutional_principles": ["Be kind."], "critique_model": "m"},
            {"method": Constitutional(principles=("Be kind.",), critique_model="m")},
        ),
        ({"stage_type": "custom", "custom_training_function": "a.b:c"}, {"method": Custom(function="a.b:c")}),
        ({"stage_type": "evaluation", "training_data": None, "validation_data": "v.jsonl"},
         {"method": Evaluation(), "training_data": None, "validation_data": "v.jsonl"}),
        ({"stage_type": "code_fine_tuning", "tags": ["own"]}, {"method": SFT(), "tags": ("code_fine_tuning", "own")}),
        ({"options": {"max_length": 64}}, {"trl": {"max_length": 64}}),
        ({"use_lora": False}, {"lora": None}),
        ({"use_lora": True}, {"lora": {}}),
        ({"use_lora": "no"}, {"lora": None}),
        ({"use_lora": True, "lora_target_modules": "all-linear"}, {"lora": {"target_modules": "all-linear"}}),
        ({"use_lora": True, "lora_alpha": 8, "lora_dropout": 0, "merge_lora_after_training": True},
         {"lora": LoRA(alpha=8, dropout=0, merge=True)}),
        ({"use_qlora": True}, {"lora": {"bits": 4}}),
        ({"use_lora": True, "use_qlora": True, "qlora_bits": 8}, {"lora": {"bits": 8}}),
        ({"use_lora": True, "use_qlora": False}, {"lora": {"bits": None}}),
        ({"method": "dpo", "use_reference_model": True}, {"method": "dpo", "reference": {"mode": "auto"}}),
        ({"method": "dpo", "share_reference_model": False}, {"method": "dpo", "reference": Reference(mode="copy")}),
        ({"method": "dpo", "update_reference_model": False},
         {"method": "dpo", "reference": Reference(update_every=None)}),
        ({"method": "dpo", "dpo_beta": 0.3}, {"method": {"type": "dpo", "beta": 0.3}}),
    ],
)  # fmt: skip
def test_each_flat_name_moves_into_its_slot(flat: dict[str, Any], slots: dict[str, Any]) -> None:
    assert stage(**flat) == stage(**slots)
    assert stage(**flat).only_set() == stage(**slots).only_set()


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"method": DPO(), "dpo_beta": 0.2}, "dpo_beta"),
        ({"method": {"type": "dpo", "beta": 0.1}, "dpo_beta": 0.1}, "dpo_beta"),
        ({"method": "dpo", "stage_type": "preference_optimization"}, "stage_type"),
        ({"method": "dpo", "preference_loss_type": "ipo"}, "preference_loss_type"),
        ({"lora": LoRA(), "use_lora": True}, "use_lora"),
        ({"lora": {"rank": 8}, "lora_rank": 8}, "lora_rank"),
        ({"lora": None, "use_lora": False}, "use_lora"),
        ({"method": "dpo", "reference": {}, "use_reference_model": True}, "use_reference_model"),
        ({"trl": {}, "options": {}}, "options"),
    ],
)
def test_both_spellings_of_one_option_are_an_error(given: dict[str, Any], path: str) -> None:
    ((told, message),) = problems(**given)
    assert told == path
    assert "given" in message


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"lora_rank": 8}, "lora_rank"),
        ({"use_lora": False, "lora_rank": 8}, "lora_rank"),
        ({"use_lora": True, "qlora_bits": 4}, "qlora_bits"),
        ({"use_lora": False, "use_qlora": True}, "use_lora"),
        ({"method": "dpo", "reference_model_update_interval": 5}, "reference_model_update_interval"),
        ({"dpo_beta": 0.1}, "dpo_beta"),
        ({"use_lora": "perhaps"}, "use_lora"),
        ({"use_qlora": True, "qlora_bits": None}, "qlora_bits"),
        ({"use_lora": True, "lora_rank": "8"}, "lora_rank"),
        ({"method": "dpo", "dpo_beta": "x"}, "dpo_beta"),
        ({"method": "dpo", "dpo_beta": None}, "dpo_beta"),
        ({"options": [1]}, "options"),
        ({"use_lora": True, "lora_target_modules": [1]}, "lora_target_modules.0"),
    ],
)
def test_a_flat_name_that_cannot_work_is_told_by_that_name(given: dict[str, Any], path: str) -> None:
    assert [told for told, _ in problems(**given)] == [path]


@pytest.mark.parametrize(
    ("selectors", "path"),
    [
        (("constitutional", "dpo", None), "fine_tuning_method"),
        (("supervised_fine_tuning", None, "sigmoid"), "preference_loss_type"),
        (("preference_optimization", "dpo", "kto"), "preference_loss_type"),
        (("preference_optimization", "ipo", "hinge"), "preference_loss_type"),
        ((None, "kto", "simple"), "preference_loss_type"),
        (("preference_optimization", "sft", "sigmoid"), "preference_loss_type"),
        (("sequence_likelihood_calibration", None, "sigmoid"), "preference_loss_type"),
        (("reward_model_training", "dpo", None), "fine_tuning_method"),
    ],
)
def test_selectors_that_contradict_each_other_are_an_error(selectors: tuple[str | None, ...], path: str) -> None:
    names = ("stage_type", "fine_tuning_method", "preference_loss_type")
    ((told, message),) = problems(**dict(zip(names, selectors, strict=True)))
    assert told == path
    assert "contradict" in message


@pytest.mark.parametrize(
    ("selectors", "type_", "loss"),
    [
        (("preference_optimization", "dpo", "sigmoid"), "dpo", "sigmoid"),
        (("preference_optimization", None, "hinge"), "dpo", "hinge"),
        (("preference_optimization", "slic_hf", "hinge"), "dpo", "hinge"),
        ((None, "dpo", "ipo"), "dpo", "ipo"),
        (("safety_alignment", "dpo", None), "dpo", "sigmoid"),
        (("lora_adapter_training", "sft", None), "sft", None),
    ],
)
def test_selectors_that_agree_select_one_method(
    selectors: tuple[str | None, ...], type_: str, loss: str | None
) -> None:
    names = ("stage_type", "fine_tuning_method", "preference_loss_type")
    method = stage(**dict(zip(names, selectors, strict=True))).method
    assert (method.type, getattr(method, "loss", None)) == (type_, loss)


@pytest.mark.parametrize(("method", "rate"), [("sft", 2e-5), ("dpo", 1e-6), ("constitutional", 2e-5)])
def test_t48_the_learning_rate_s_default_is_the_method_s_and_ten_times_that_with_lora(
    method: str, rate: float
) -> None:
    assert stage(method=method).resolved_learning_rate() == rate
    with_lora = stage(method=method, lora={}).resolved_learning_rate()
    assert repr(with_lora) == repr(float(f"{10 * rate:.3g}"))
    assert stage(method=method, lora={}, learning_rate=3e-4).resolved_learning_rate() == 3e-4
    assert stage(method=method, learning_rate=None).resolved_learning_rate() == rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("6h", 21600), ("2d", 172800), ("1.5h", 5400), ("1e3s", 1000)]
)
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert stage(max_duration=text).max_duration == timedelta(seconds=seconds)


def test_a_duration_may_be_a_timedelta_or_none() -> None:
    assert stage(max_duration=timedelta(minutes=1)).max_duration == timedelta(minutes=1)
    assert stage(max_duration=None).max_duration is None
    assert stage().max_duration == timedelta(hours=24)


def test_a_bare_stage_is_full_supervised_fine_tuning() -> None:
    bare = stage()
    assert bare.method == SFT()
    assert (bare.model, bare.lora, bare.reference, bare.generation, bare.trl) == (None, None, None, None, {})
    assert bare.only_set() == {"name": "a", "training_data": "rows.jsonl"}


def test_a_method_may_be_named_by_its_type_alone() -> None:
    assert stage(method="dpo") == stage(method={"type": "dpo"}) == stage(method=DPO())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("dpoo", "unknown stage type 'dpoo'; did you mean 'dpo'?"),
        ("merge", f"'merge' is planned, but not built yet; built are {', '.join(BUILT)}"),
        (5, "a method is a stage type's name or a mapping with type, not 5"),
    ],
)  # fmt: skip
def test_a_method_that_is_none_is_told_with_the_way_out(method: object, message: str) -> None:
    assert problems(method=method) == [("method", message)]


def test_a_stage_needs_a_name() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingStage(training_data="x")
    assert [tuple(one) for one in caught.value.problems] == [("name", "missing; it has no default")]


def test_every_family_s_option_is_an_option_of_the_stage() -> None:
    assert set(StageOptions.model_fields) < set(TrainingStage.model_fields)
    assert set(TrainingStage.model_fields) - set(StageOptions.model_fields) == {
        "method", "model", "lora", "reference", "generation", "text_metrics", "gate", "scheduler_kwargs", "trl"
    }  # fmt: skip


def test_paths_as_objects_are_paths_as_text() -> None:
    from pathlib import Path

    assert stage(training_data=Path("x.jsonl"), model=Path("m")) == stage(training_data="x.jsonl", model="m")


def test_data_given_as_a_mapping_with_source_is_a_data_object() -> None:
    from stagekit import Data

    assert stage(training_data={"source": "x.jsonl", "columns": {"text": "t"}}).training_data == Data(
        "x.jsonl", columns={"text": "t"}
    )
    assert problems(training_data={"sorce": "x", "split": "train"}) == [
        ("training_data.source", "missing; it has no default"),
        ("training_data.sorce", "unknown option; did you mean 'source'?"),
    ]


def test_a_problem_in_one_of_several_named_sets_says_which() -> None:
    given = {"good": "x.jsonl", "bad": {"source": 5, "splt": "a"}, "none": None, "list": []}
    assert [path for path, _ in problems(training_data=given, data_mixing_ratios=dict.fromkeys(given, 1))] == [
        "training_data.bad.source",
        "training_data.bad.splt",
        "training_data.none",
        "training_data.list",
    ]
