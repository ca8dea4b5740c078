"""Rewards as declared: what is wrong with them is told before anything is loaded."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import ConfigError, TrainingPipeline, TrainingStage, sandbox
from stagekit.checks import problems_on_disk
from stagekit.groups import VERIFIERS
from stagekit.reward_options import columns_of


Write = Callable[..., Path]


def stage(reward: Any, data: str = "x.jsonl", kind: str = "grpo", **options: Any) -> TrainingStage:
    method = {"type": kind, "reward": reward}
    return TrainingStage(name="s", training_data=data, method=method, **options)


def problems(reward: Any, data: Path, model: str) -> list[str]:
    pipeline = TrainingPipeline(name="p", model=model, stages=(stage(reward, str(data)),))
    return [str(problem) for problem in problems_on_disk(pipeline)]


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo", "online_dpo", "rejection_sampling"])
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("numeric", {"tolerence": 1}, r"tolerence: numeric has no such option; did you mean 'tolerance'\?"),
        ("numeric", {"tolerance": -1}, r"tolerance: must be greater than or equal to 0, not -1"),
        ("numeric", {"tolerance": "1e-3"}, r"tolerance: must be a (valid )?number, not '1e-3'"),
        ("exact", {"extract": "("}, r"extract: reward extract: '\(' is no regular expression"),
        ("exact", {"ignore_case": "no"}, r"ignore_case: must be (true or false|a valid boolean), not 'no'"),
        ("exact", {"column": 3}, r"column: must be (text|a valid string), not 3"),
        ("regex", {}, r"pattern: reward regex: options\.pattern is missing"),
        ("regex", {"pattern": "["}, r"pattern: reward regex: '\[' is no regular expression"),
        ("format", {"tags": []}, r"tags: reward format: options\.tags is \[\]; give a list of names"),
        ("json_schema", {"schema": {"oneOf": []}}, r"schema: schema\.oneOf: is not looked at"),
        ("maths", {"cpu_seconds": 0}, r"cpu_seconds: must be greater than or equal to 1, not 0"),
        ("python_tests", {"memory_mb": 1.5}, r"memory_mb: must be (a whole number|a valid integer), not 1\.5"),
        ("python_tests", {"wall_seconds": 0}, r"wall_seconds: must be greater than 0, not 0"),
        ("python_tests", {"timeout": 3}, r"timeout: python_tests has no such option; it has all_or_nothing"),
    ],
)
def test_an_option_that_cannot_be_is_told_with_its_path(
    kind: str, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"method\.reward\.options\.{message}"):
        stage({"source": source, "options": options}, kind=kind)


def test_all_problems_are_told_at_once_each_at_its_reward() -> None:
    rewards = [
        {"source": "regex", "options": {"patern": "x"}},
        {"source": "maths", "options": {"boxed": 1, "cpu_seconds": -1}},
        {"source": "a/model", "options": {"x": 1}},
    ]
    with pytest.raises(ConfigError) as caught:
        stage(rewards)
    paths = {problem.path.partition("method.")[2] for problem in caught.value.problems}
    assert paths == {
        "reward.0.options.patern", "reward.0.options.pattern", "reward.1.options.boxed",
        "reward.1.options.cpu_seconds", "reward.2.options",
    }  # fmt: skip


@pytest.mark.parametrize("name", VERIFIERS)
def test_the_defaults_of_a_verifier_are_options_that_can_be(name: str) -> None:
    options = {"regex": {"pattern": "x"}}.get(name, {})
    assert stage({"source": name, "options": options}).method.type == "grpo"


def test_the_column_that_a_reward_compares_with_must_be_in_the_data(write_rows: Write, tiny_model_path: str) -> None:
    data = write_rows([{"prompt": "1 + 1 =", "gold": "2", "tests": ["pass"]}], "rows.jsonl")
    for name, column in (
        ("exact", "answer"),
        ("numeric", "answer"),
        ("maths", "answer"),
        ("accuracy_reward", "solution"),
    ):
        (problem,) = problems(name, data, tiny_model_path)
        assert f"needs columns (prompt, {column}); found prompt, gold, tests" in problem
    assert problems({"source": "maths", "options": {"column": "gold"}}, data, tiny_model_path) == []
    assert problems({"source": "regex", "options": {"pattern": "2"}}, data, tiny_model_path) == []


def test_the_columns_of_all_rewards_are_known() -> None:
    rewards = ["exact", {"source": "python_tests", "options": {"column": "t"}}, "accuracy_reward", "format"]
    assert list(columns_of(stage(rewards).method.reward)) == ["answer", "t", "solution"]


@pytest.mark.parametrize("name", ["maths", "accuracy_reward"])
def test_a_missing_package_is_told_by_check_with_the_way_to_have_it(
    name: str, write_rows: Write, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows([{"prompt": "1 + 1 =", "answer": "2", "solution": "2"}], "rows.jsonl")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *more: None if module == "math_verify" else find(module, *more)
    )
    (problem,) = problems(name, data, tiny_model_path)
    assert problem.startswith(f"stages.s.method.reward: '{name}' needs math-verify, which is not installed")
    assert 'pip install "trl-stagekit[verifiers]"' in problem


def test_a_sandbox_that_is_refused_is_told_by_check_unless_it_is_unsafe(
    write_rows: Write, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows([{"prompt": "f", "tests": ["pass"]}], "rows.jsonl")
    monkeypatch.setattr(sandbox, "refused", lambda: {"network": "unshare: Operation not permitted"})
    (problem,) = problems("python_tests", data, tiny_model_path)
    assert "stages.s.method.reward: " in problem and "refuses network: unshare" in problem
    assert problems({"source": "python_tests", "options": {"unsafe": True}}, data, tiny_model_path) == []
