"""The ground of the declaration: strict keys, all problems at once, overrides, what was set."""

import functools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest

from stagekit import DPO, ConfigError, Custom, Data, EarlyStopping, Generation, LoRA, TrainingStage
from stagekit.options import duration_text, function_name, with_overrides
from stagekit.stage_options import StageOptions


def problems(build: Callable[[], object]) -> list[tuple[str, str]]:
    """The problems of the ConfigError that `build` raises, as (path, message)."""
    with pytest.raises(ConfigError) as caught:
        build()
    return [(problem.path, problem.message) for problem in caught.value.problems]


def stage(**given: Any) -> TrainingStage:
    return TrainingStage(**{"name": "a", "training_data": "rows.jsonl", **given})


def test_every_problem_is_told_at_once_with_its_path() -> None:
    assert problems(
        lambda: stage(epochs=0, lora={"rank": "x", "r": 8}, method={"type": "dpo", "bta": 0.1}, warmup_ratio=2)
    ) == [
        ("epochs", "must be greater than or equal to 1, not 0"),
        ("warmup_ratio", "must be less than or equal to 1, not 2"),
        ("method.bta", "unknown option; did you mean 'beta'?"),
        ("lora.rank", "must be a whole number, not 'x'"),
        ("lora.r", "unknown option; here it is called 'rank'"),
    ]


def test_the_text_of_an_error_counts_and_lists_its_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRA(rank=0, alpha=0)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "2 problems:\n  rank: must be greater than or equal to 1, not 0\n  alpha: must be greater than 0, not 0"
    )


@pytest.mark.parametrize(("foreign", "ours"), sorted(StageOptions.foreign.items()))
def test_a_name_of_another_system_is_told_with_ours(foreign: str, ours: str) -> None:
    assert (foreign, f"unknown option; here it is called {ours!r}") in problems(lambda: stage(**{foreign: 1}))


def test_the_foreign_names_lead_to_options_that_exist() -> None:
    first_words = {ours.split()[0].rstrip(":").split(".")[0] for ours in StageOptions.foreign.values()}
    assert first_words - set(TrainingStage.model_fields) == {"output_dir"}
    assert StageOptions.foreign["num_train_epochs"] == "epochs"
    assert StageOptions.foreign["per_device_train_batch_size"] == "batch_size"


def test_an_unknown_option_suggests_the_nearest_name() -> None:
    assert problems(lambda: stage(lerning_rate=1e-5)) == [
        ("lerning_rate", "unknown option; did you mean 'learning_rate'?")
    ]
    assert problems(lambda: Data("x", qqqq=1)) == [("qqqq", "unknown option; known are columns, source, split")]


@pytest.mark.parametrize("value", ["3", True, 3.5, None, [3], "three"])
def test_a_whole_number_is_no_text_no_bool_and_no_fraction(value: object) -> None:
    assert [path for path, _ in problems(lambda: stage(epochs=value))] == ["epochs"]


@pytest.mark.parametrize(("value", "read"), [("5e-7", 5e-7), ("2", 2.0), (1, 1.0), (1e-5, 1e-5)])
def test_a_number_may_be_written_as_text_because_yaml_reads_5e_7_so(value: object, read: float) -> None:
    assert stage(learning_rate=value).learning_rate == read


@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), 0, -1, []])
def test_a_rate_is_a_finite_number_above_0(value: object) -> None:
    assert [path for path, _ in problems(lambda: stage(learning_rate=value))] == ["learning_rate"]


def test_an_option_of_a_closed_set_tells_the_set_and_the_nearest() -> None:
    assert problems(lambda: stage(mixed_precision_dtype="bf61")) == [
        (
            "mixed_precision_dtype",
            "must be 'none', 'fp16', 'bf16', 'tf32', 'fp8_e4m3', 'fp8_e5m2' or 'fp8_hybrid', not 'bf61'; "
            "did you mean 'bf16'?",
        )
    ]


def test_a_long_value_is_quoted_short() -> None:
    ((_, message),) = problems(lambda: stage(tags="x" * 500))
    assert len(message) < 120 and message.endswith("...")


def test_a_name_that_yaml_read_as_no_text_is_refused_by_name() -> None:
    assert problems(lambda: stage(lora={True: 1, 5: 2})) == [
        ("lora.True", "True is no name of an option; names are text"),
        ("lora.5", "5 is no name of an option; names are text"),
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("training_data", 5), ("training_data", []), ("training_data", {}), ("training_data", ""), ("method", None),
        ("method", 5), ("method", {"type": [1]}), ("method", []), ("lora", True), ("lora", "x"), ("trl", [1]),
        ("tags", "x"), ("tags", [1]), ("name", 5), ("metadata", 5), ("early_stopping", True), ("model", 5),
        ("model", ""), ("model", "package:"), ("validation_data", {"a": "b"}), ("max_duration", 5),
        ("max_duration", "1"), ("max_duration", "-1h"), ("max_duration", "infh"), ("max_duration", "1e300d"),
        ("max_duration", "0s"), ("reference", "copy"), ("generation", 1), ("run_condition", "x"),
        ("data_mixing_ratios", [0.5]), ("enabled", "maybe"), ("frozen_layers", {"a": 1}), ("model", b"x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["sft", "dpo", "constitutional"])
def test_a_value_of_a_wrong_kind_is_a_problem_at_its_path(option: str, value: object, method: str) -> None:
    given = {"method": method, option: value}
    assert option in {path.partition(".")[0] for path, _ in problems(lambda: stage(**given))}


def test_a_declaration_cannot_be_changed() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="frozen"):
        stage().epochs = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        LoRA().rank = 4  # type: ignore[misc]


def test_only_set_keeps_what_was_set_in_plain_data() -> None:
    declared = stage(
        method=DPO(beta=0.1), lora=LoRA(), tags=("x",), max_duration="2h", run_condition=function_name, model=None
    )
    assert declared.only_set() == {
        "name": "a",
        "tags": ["x"],
        "run_condition": "stagekit.options:function_name",
        "training_data": "rows.jsonl",
        "max_duration": "7200s",
        "method": {"type": "dpo", "beta": 0.1},
        "model": None,
        "lora": {},
    }


def test_only_set_tells_a_default_that_was_said_from_one_that_was_not() -> None:
    assert stage(epochs=3).only_set() == {"name": "a", "training_data": "rows.jsonl", "epochs": 3}
    assert stage(epochs=3) == stage()


@pytest.mark.parametrize("seconds", [1, 90.5, 86400, 1234567, 31536000])
def test_a_duration_survives_its_text(seconds: float) -> None:
    text = duration_text(timedelta(seconds=seconds))
    assert stage(max_duration=text).max_duration == timedelta(seconds=seconds)


class Doubler:
    """A callable object."""

    def __call__(self, value: int) -> int:
        return 2 * value


def test_a_function_is_named_by_module_and_qualified_name() -> None:
    assert function_name("pkg.mod:f.g") == "pkg.mod:f.g"
    assert function_name(test_a_function_is_named_by_module_and_qualified_name) == (
        f"{__name__}:test_a_function_is_named_by_module_and_qualified_name"
    )
    assert function_name(Doubler()) == f"{__name__}:Doubler"
    assert function_name(functools.partial(int)) == "functools:partial"


@pytest.mark.parametrize("name", ["f", "pkg.f", "pkg:", ":f", "pkg:f()", "a b:c", "./x.py:f", 5])
def test_a_function_needs_a_module_and_a_name(name: object) -> None:
    message = "a function is named as 'package.module:function' (or passed itself from Python)"
    assert problems(lambda: Custom(function=name)) == [("function", message)]


def test_the_backend_of_generation_is_a_library_a_server_or_a_function() -> None:
    assert Generation(backend="pkg.mod:answer").backend == "pkg.mod:answer"
    assert Generation(backend=Doubler()).only_set().keys() == {"backend"}
    assert problems(lambda: Generation(backend="vlm")) == [
        (
            "backend",
            "is 'transformers', 'vllm', the URL of a server (http://HOST:PORT/v1, with #MODEL where it serves "
            "several), or a function named as 'package.module:function', not 'vlm'",
        )
    ]


def test_data_is_given_by_position_or_by_name() -> None:
    assert Data("x.jsonl", split="train") == Data(source="x.jsonl", split="train")
    assert problems(Data) == [("source", "missing; it has no default")]


RAW: Mapping[str, Any] = {
    "model": "m",
    "stages": [{"name": "sl", "method": "dpo"}, {"name": "rl", "lora": {"rank": 8}}],
}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("model=other", {"model": "other"}),
        ("--model=other", {"model": "other"}),
        ("stages.rl.lora.rank=16", ("rl", {"lora": {"rank": 16}})),
        ("stages.1.lora.rank=16", ("rl", {"lora": {"rank": 16}})),
        ("stages.sl.method.beta=0.2", ("sl", {"method": {"type": "dpo", "beta": 0.2}})),
        ("stages.sl.early_stopping.patience=2", ("sl", {"early_stopping": {"patience": 2}})),
        ("stages.sl.tags=[a, b]", ("sl", {"tags": ["a", "b"]})),
        ("stages.sl.enabled=false", ("sl", {"enabled": False})),
        ("stages.sl.lora=", ("sl", {"lora": None})),
        ("stages.sl.description=a=b", ("sl", {"description": "a=b"})),
        ("stages.sl.learning_rate=5e-7", ("sl", {"learning_rate": "5e-7"})),
    ],
)
def test_an_override_reads_its_value_as_yaml_and_its_path_by_name_or_index(assignment: str, expected: Any) -> None:
    changed = with_overrides(RAW, [assignment])
    if isinstance(expected, dict):
        assert changed == {**RAW, **expected}
    else:
        name, options = expected
        assert [one for one in changed["stages"] if one["name"] == name] == [
            {**next(one for one in RAW["stages"] if one["name"] == name), **options}
        ]


def test_overrides_leave_the_given_data_alone() -> None:
    before = {"stages": [{"name": "a"}]}
    with_overrides(before, ["stages.a.epochs=1"])
    assert before == {"stages": [{"name": "a"}]}


def test_the_last_of_two_overrides_wins() -> None:
    assert with_overrides({}, ["epochs=1", "epochs=2"]) == {"epochs": 2}


def test_wrong_overrides_are_told_all_at_once() -> None:
    assignments = ["model", "=x", "stages.r.epochs=1", "stages.7=1", "model.size=1", "model=[1", "model=2024-13-01"]
    told = problems(lambda: with_overrides(RAW, assignments))
    assert [path for path, _ in told] == ["model", "=x", "stages.r.epochs", "stages.7", "model.size", "model", "model"]
    assert [message.partition(";")[0] for _, message in told] == [
        "an override is written path.to.option=value",
        "an override is written path.to.option=value",
        "no item 'r' here",
        "no item '7' here",
        "model is 'm', it has no options of its own",
        "the value '[1' is not YAML: expected ',' or ']', but got '<stream end>'",
        "the value '2024-13-01' is not YAML: month must be in 1..12",
    ]
    assert told[2][1] == "no item 'r' here; there are sl, rl"


def test_an_override_into_something_without_options_is_no_silent_no_op() -> None:
    assert problems(lambda: with_overrides({"stages": ["sft"]}, ["stages.0.epochs=1"])) == [
        ("stages.0.epochs", "stages.0 is 'sft', it has no options of its own")
    ]


def test_early_stopping_as_declared_is_the_specification_s() -> None:
    assert stage().early_stopping == EarlyStopping(patience=5, metric="loss", min_delta=1e-4, maximize=False)
