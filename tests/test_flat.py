"""The flat door: in and out again, for every stage that the specification's names can say."""

import csv
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagekit import (
    DPO,
    ConfigError,
    Constitutional,
    Data,
    EarlyStopping,
    Generation,
    LoRA,
    Reference,
    TrainingPipeline,
    TrainingStage,
)
from stagekit.adapters import METHODS
from stagekit.flat import FLAT, MOVED, default_of
from stagekit.options import values_only
from stagekit.pipeline import to_plain
from stagekit.stage_options import StageOptions


def stage(**given: Any) -> TrainingStage:
    return TrainingStage(**{"name": "a", "training_data": "rows.jsonl", **given})


@pytest.fixture
def declared_only() -> Iterator[None]:
    """Build stages of types that are declared but not built."""
    token = values_only.set(True)
    yield
    values_only.reset(token)


POSITIVE = st.integers(1, 2**31)
RATE = st.floats(1e-9, 1, exclude_min=True)
TEXT = st.text("abcxyz ", max_size=5)
PLAIN = st.none() | st.booleans() | st.integers() | TEXT
OF_ALL = {
    "description": st.none() | TEXT,
    "tags": st.lists(TEXT, max_size=2),
    "metadata": st.dictionaries(TEXT, PLAIN, max_size=2),
    "enabled": st.booleans(),
    "run_condition": st.just("pkg.mod:condition"),
    "data_preprocessor": st.just("pkg.mod:preprocess"),
    "random_seed": st.integers(0, 2**32 - 1),
}
OF_TRAINING = {
    "use_deterministic_algorithms": st.booleans(),
    "max_steps": st.integers(0, 10),
    "epochs": POSITIVE,
    "max_duration": st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=400)),
    "batch_size": POSITIVE,
    "gradient_accumulation_steps": POSITIVE,
    "use_gradient_checkpointing": st.booleans(),
    "max_gradient_norm": st.floats(0, 10),
    "optimizer_override": st.sampled_from(["adamw", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adafactor"]),
    "learning_rate": st.none() | RATE,
    "weight_decay": st.floats(0, 1),
    "scheduler_type": st.sampled_from(["constant", "cosine_annealing", "polynomial", "linear_warmup"]),
    "warmup_ratio": st.floats(0, 0.99),
    "logging_steps": st.integers(0, 100),
    "log_gradient_norms": st.booleans(),
    "log_learning_rate": st.booleans(),
    "save_checkpoint_after": st.booleans(),
    "checkpoint_save_steps": st.integers(0, 1000),
    "checkpoint_save_epochs": st.integers(0, 10),
    "max_checkpoints_to_keep": POSITIVE,
    "data_shuffle_seed": st.none() | st.integers(0, 2**32 - 1),
    "max_training_samples": st.none() | POSITIVE,
    "options": st.dictionaries(st.sampled_from(["max_length", "packing"]), PLAIN, max_size=2),
}
OF_VALIDATION = {
    "evaluation_steps": st.integers(0, 100),
    "early_stopping": st.none() | st.builds(EarlyStopping, patience=POSITIVE, maximize=st.booleans()),
    "metrics_to_track": st.lists(st.sampled_from(["loss", "accuracy"]), unique=True),
}
OF_LORA = {
    "lora_rank": POSITIVE,
    "lora_alpha": st.floats(0.5, 100),
    "lora_dropout": st.floats(0, 1),
    "lora_target_modules": st.lists(st.sampled_from(["q_proj", "o_proj"]), max_size=2) | st.just("all-linear"),
    "merge_lora_after_training": st.booleans(),
}
SELECTED = {
    "sft": ({"stage_type": st.sampled_from(["supervised_fine_tuning", "code_fine_tuning", "warmup"])}, {}),
    "dpo": (
        {"stage_type": st.sampled_from(["preference_optimization", "preference_ranking"])},
        {
            "dpo_beta": RATE,
            "preference_loss_type": st.sampled_from(["sigmoid", "hinge", "ipo"]),
            "use_reference_model": st.just(True),
            "update_reference_model": st.just(False),
        },
    ),
    "constitutional": (
        {"fine_tuning_method": st.just("constitutional_ai")},
        {
            "critique_revision_rounds": POSITIVE,
            "critique_model": st.none() | st.just("some/model"),
            "constitutional_principles": st.lists(TEXT, min_size=1, max_size=3),
        },
    ),
    "rejection_sampling": (
        {
            "stage_type": st.sampled_from(["rejection_sampling", "rank_responses"]),
            "reward_model": st.sampled_from(["pkg.mod:f", "some/model"]),
        },
        {
            "rejection_sampling_n": st.integers(4, 20),
            "rejection_sampling_top_k": st.integers(1, 4),
            "rejection_sampling_min_reward": st.none() | st.floats(-1, 1),
        },
    ),
    "self_play": (
        {"fine_tuning_method": st.just("spin")},
        {
            "dpo_beta": RATE,
            "self_play_iterations": POSITIVE,
            "self_play_responses_per_prompt": POSITIVE,
            "self_play_temperature": st.floats(0.1, 2),
        },
    ),
    "custom": (
        {"stage_type": st.just("custom"), "custom_training_function": st.just("pkg.mod:train")},
        {"training_data": st.just("rows.jsonl")},
    ),
    "evaluation": (
        {"stage_type": st.just("evaluation")},
        {"batch_size": POSITIVE, "use_deterministic_algorithms": st.booleans()},
    ),
}


@st.composite
def flat_stages(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments in flat spelling, of every built type, that make a stage."""
    kind = draw(st.sampled_from(sorted(SELECTED)))
    required, optional = SELECTED[kind]
    choices: dict[str, Any] = {**OF_ALL, **optional}
    flat = {"name": draw(TEXT.filter(str.strip)), **draw(st.fixed_dictionaries(dict(required)))}
    if kind == "evaluation":
        flat["validation_data"] = "rows.jsonl"
    elif kind != "custom":
        flat["training_data"] = "rows.jsonl"
        choices |= OF_TRAINING
        if draw(st.booleans()):
            flat |= {"validation_data": "held_out.jsonl"}
            choices |= OF_VALIDATION
        if draw(st.booleans()):
            flat |= {"use_lora": True}
            choices |= OF_LORA
            if draw(st.booleans()):
                flat |= draw(st.fixed_dictionaries({"use_qlora": st.booleans()}))
                if flat["use_qlora"]:
                    flat["qlora_bits"] = draw(st.sampled_from([4, 8]))
        elif kind == "dpo":
            choices["share_reference_model"] = st.booleans()
    return flat | draw(st.fixed_dictionaries({}, optional=choices))


@settings(max_examples=80, deadline=None)
@given(flat_stages())
def test_a_stage_that_flat_names_can_say_survives_the_way_out_and_in(flat: dict[str, Any]) -> None:
    declared = TrainingStage(**flat)
    again = TrainingStage(**declared.to_flat(only_set=True))
    assert again == declared
    assert again.only_set() == declared.only_set()


@settings(max_examples=60, deadline=None)
@given(flat_stages())
def test_a_stage_survives_plain_data_and_yaml(flat: dict[str, Any]) -> None:
    import yaml

    declared = TrainingStage(**flat)
    plain = yaml.safe_load(yaml.safe_dump(declared.only_set()))
    assert TrainingStage(**plain) == declared
    assert TrainingStage(**plain).only_set() == declared.only_set()


def test_a_pipeline_survives_plain_data_and_its_file(tmp_path: Path) -> None:
    import yaml

    from stagekit import load
    from stagekit.parse import parse

    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    pipeline = TrainingPipeline(
        name="cai",
        model="some/model",
        output_dir=tmp_path / "run",
        stages=(
            TrainingStage(
                name="sl-cai",
                method=Constitutional(principles=("Be kind.",), target="final"),
                training_data=Data(tmp_path / "train.jsonl", columns={"prompt": "prompt"}),
                generation=Generation(max_new_tokens=32),
                max_duration=timedelta(hours=6),
                lora=LoRA(rank=8),
            ),
            TrainingStage(
                name="rl-cai",
                method=DPO(loss="ipo"),
                training_data={"a": str(tmp_path / "train.jsonl"), "b": Data("stage:sl-cai/preferences")},
                data_mixing_ratios={"a": 0.25, "b": 0.75},
                validation_data=str(tmp_path / "held.jsonl"),
                early_stopping=None,
                trl={"max_length": 64},
                learning_rate=5e-7,
            ),
        ),
    )
    plain = to_plain(pipeline)
    assert parse(plain) == pipeline
    assert to_plain(parse(plain)) == plain
    (tmp_path / "cai.yaml").write_text(yaml.safe_dump(plain))
    assert load(tmp_path / "cai.yaml") == pipeline


def test_a_bare_stage_in_flat_names_has_the_specification_s_defaults() -> None:
    flat = stage().to_flat()
    assert sorted(flat) == sorted(FLAT)
    assert len(flat) == 108
    assert {name: value for name, value in flat.items() if value != default_of(name)} == {
        "name": "a",
        "training_data": "rows.jsonl",
    }


SPEC = list(csv.DictReader(Path(__file__).with_name("data").joinpath("spec_properties.csv").open(encoding="utf-8")))

IN_WORDS = {
    "constitutional_principles": ("Default includes standard HHH (Helpful, Harmless, Honest) principles", None),
    "distributed_strategy": ("None (single device)", "none"),
    "early_stopping": (
        "Default configuration with patience=5 and monitoring loss", EarlyStopping(patience=5, metric="loss")
    ),
    "lora_target_modules": ("Default targets query and value projections", ("q_proj", "v_proj")),
    "max_duration": ("24 hours", timedelta(hours=24)),
    "metadata": ("Empty by default", {}),
    "metrics_to_track": ("Default includes loss and perplexity", ("loss", "perplexity")),
    "mixed_precision_dtype": ("FP16 for broad compatibility", "fp16"),
    "scheduler_type": ("CosineAnnealing, which works well for most fine-tuning scenarios", "cosine_annealing"),
    "tags": ("Empty by default", ()),
}  # fmt: skip
"""Where the page says its default in words: those words, and what they mean here."""


def meaning(name: str, kind: str, words: str) -> Any:
    """What the page's default means; the page's first word is the value."""
    if name in IN_WORDS:
        assert IN_WORDS[name][0] == words
        return IN_WORDS[name][1]
    first = words.split()[0].rstrip(",")
    if first == "empty":
        return {} if kind.startswith("Dictionary") else ()
    if kind == "bool":
        return {"true": True, "false": False}[first]
    return {"int": int, "double": float}.get(kind, str.lower)(first)


@pytest.mark.parametrize(
    ("name", "kind", "words"), [(row["name"], row["type"], row["default"]) for row in SPEC if row["default"]]
)
def test_the_default_is_the_one_that_the_specification_s_page_states(name: str, kind: str, words: str) -> None:
    assert stage().to_flat()[name] == meaning(name, kind, words)


UNSAID = {
    "callbacks", "critique_model", "custom_evaluation_function",
    "custom_loss_function", "custom_metric_name", "custom_training_function", "data_mixing_ratios",
    "data_preprocessor", "data_shuffle_seed", "description", "enabled", "fine_tuning_method",
    "gradient_accumulation_steps", "is_evaluation_only", "max_training_samples", "name", "options", "reward_model",
    "run_condition", "shuffle_data", "stage_type", "teacher_model", "training_data", "use_gradient_checkpointing",
    "validation_data",
}  # fmt: skip


def test_the_page_states_no_default_for_these_and_null_properties_are_none() -> None:
    assert {row["name"] for row in SPEC if not row["default"]} == UNSAID
    bare = stage().to_flat()
    said_otherwise = {"options": {}, "training_data": "rows.jsonl"}
    for row in SPEC:
        if row["type"].endswith("?"):
            assert bare[row["name"]] == said_otherwise.get(row["name"]), row["name"]


def test_all_flat_values_of_a_stage_are_what_the_stage_does() -> None:
    flat = stage(
        method=DPO(beta=0.3, loss="hinge"), reference={"mode": "copy"}, learning_rate=None, trl={"max_length": 5}
    ).to_flat()
    told = {
        "stage_type": "preference_optimization",
        "fine_tuning_method": "dpo",
        "preference_loss_type": "hinge",
        "dpo_beta": 0.3,
        "use_reference_model": True,
        "share_reference_model": False,
        "update_reference_model": False,
        "learning_rate": 1e-6,
        "options": {"max_length": 5},
        "use_lora": False,
        "lora_rank": 16,
        "critique_revision_rounds": 2,
    }
    assert {name: flat[name] for name in told} == told
    with_lora = stage(lora=LoRA(rank=4, bits=8)).to_flat()
    told = {"use_lora": True, "lora_rank": 4, "use_qlora": True, "qlora_bits": 8, "learning_rate": 2e-4}
    assert {name: with_lora[name] for name in told} == told


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"generation": Generation(), "method": "constitutional"}, "generation"),
        ({"model": "some/model"}, "model"),
        ({"method": "dpo", "reference": {"mode": "precompute"}}, "reference.mode"),
        ({"method": {"type": "constitutional", "target": "final"}}, "method.target"),
        ({"method": {"type": "constitutional", "max_critique_tokens": 9}}, "method.max_critique_tokens"),
        (
            {
                "method": {"type": "constitutional", "unrevised": ["a"]},
                "training_data": {"a": "x", "b": "y"},
                "data_mixing_ratios": {"a": 1, "b": 1},
            },
            "method.unrevised",
        ),
    ],
)
def test_what_flat_names_cannot_say_is_an_error_with_its_path(given: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stage(**given).to_flat(only_set=True)
    assert [problem.path for problem in caught.value.problems] == [f"stages.a.{path}"]


@pytest.mark.usefixtures("declared_only")
@pytest.mark.parametrize(
    "kind", sorted(set(METHODS) - {"online_dpo", "ai_feedback"})
)  # no enum value selects them first
def test_every_stage_type_is_said_by_the_selectors_alone(kind: str) -> None:
    given = {"function": "a.b:c"} if kind == "custom" else {}
    declared = TrainingStage(name="a", method={"type": kind, **given})
    flat = declared.to_flat(only_set=True)
    assert set(flat) <= {"name", "stage_type", "fine_tuning_method", "custom_training_function"}
    assert TrainingStage(**flat) == declared


@pytest.mark.usefixtures("declared_only")
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, home in MOVED.items() if name != "custom_training_function"
                       for kind in home.types]
)  # fmt: skip
def test_every_option_of_a_method_has_its_flat_name_in_each_type_that_has_it(name: str, kind: str) -> None:
    key = MOVED[name].path.removeprefix("method.")
    value = METHODS[kind].model_fields[key].default
    declared = TrainingStage(name="a", method={"type": kind, key: value})
    flat = declared.to_flat(only_set=True)
    assert flat[name] == value
    assert TrainingStage(**flat) == declared
    assert TrainingStage(**flat).only_set() == declared.only_set()


@pytest.mark.usefixtures("declared_only")
@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "simpo"])
def test_the_three_selectors_that_a_preference_stage_gives_agree(kind: str) -> None:
    flat = TrainingStage(name="a", method=kind).to_flat()
    selectors = {name: flat[name] for name in ("stage_type", "fine_tuning_method", "preference_loss_type")}
    assert TrainingStage(name="b", **selectors).method.type == kind


@pytest.mark.usefixtures("declared_only")
@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_stage_of_every_type_gives_all_108_values(kind: str) -> None:
    given = {"function": "a.b:c"} if kind == "custom" else {}
    assert sorted(TrainingStage(name="a", method={"type": kind, **given}).to_flat()) == sorted(FLAT)


def test_an_option_that_is_not_moved_keeps_its_name() -> None:
    assert {name for name, home in FLAT.items() if home.path == name} == set(StageOptions.model_fields)
    assert len(FLAT) == len(StageOptions.model_fields) + len(MOVED) == 108


def test_a_reference_that_says_nothing_is_said_by_its_default() -> None:
    declared = stage(method="dpo", reference=Reference())
    assert TrainingStage(**declared.to_flat(only_set=True)) == stage(method="dpo", reference=Reference(mode="auto"))
