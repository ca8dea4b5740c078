"""The custom stage through a pipeline on the tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit.adapters import Custom
from stagekit.errors import ConfigError, StageError
from stagekit.stage import TrainingStage
from tests.running import pipeline, run, same, stage


Write = Callable[..., Path]


def custom(name: str, function: Any, **options: Any) -> TrainingStage:
    return TrainingStage(name=name, method=Custom(function=function), **options)


@pytest.fixture
def rows(write_rows: Write, sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows))


def test_the_function_gets_what_the_stage_has(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    seen: list[Any] = []
    first = stage("a", rows, max_steps=1)
    own = custom("b", seen.append, training_data=rows, validation_data=rows, random_seed=7, metadata={"k": 1})
    result = run(tiny_model_path, tmp_path, first, own)
    (context,) = seen
    assert context.model == result["a"].policy
    assert (len(context.train_dataset), len(context.eval_dataset)) == (16, 16)
    assert (context.seed, context.metadata, context.output_dir) == (7, {"k": 1}, tmp_path / "02-b")
    assert context.results["a"] == result["a"]
    assert not context.stop()
    assert result["b"].status == "completed"
    assert result.policy == result["a"].policy


def test_its_policy_datasets_and_metrics_are_the_results(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    own = custom("own", "tests.answers:custom", training_data=rows)
    result = run(tiny_model_path, tmp_path, own, stage("next", "stage:own/own", max_steps=1, warmup_ratio=0))
    assert result["own"].metrics == {"rows": 16.0}
    assert result["own"].policy == tiny_model_path
    assert result["next"].samples_trained == 4
    assert not same(tiny_model_path, str(result.policy))


def test_a_custom_stage_needs_neither_model_nor_data(tmp_path: Path) -> None:
    result = run(None, tmp_path, custom("a", lambda context: {"metrics": {"x": 1}}))
    assert result["a"].metrics == {"x": 1.0}
    assert result.policy is None


@pytest.mark.parametrize("returned", [3, {"model": "x"}, ["policy"]], ids=str)
def test_what_is_no_result_is_refused_by_its_value(returned: Any, tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match=r"stage 'a': its function returned .*; return None, or a mapping with policy"
    ):
        run(None, tmp_path, custom("a", lambda context: returned))


def test_a_policy_or_dataset_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"stage 'a': its function returned dataset 'rows' at .*nowhere.jsonl"):
        run(None, tmp_path, custom("a", lambda context: {"datasets": {"rows": tmp_path / "nowhere.jsonl"}}))
    with pytest.raises(StageError, match=r"stage 'b': its function returned policy /.*nowhere, which is not there"):
        run(None, tmp_path, custom("b", lambda context: {"policy": tmp_path / "nowhere"}))


def test_an_unknown_module_is_found_by_the_check(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.a\.function|stages\.a\.method\.function: no module 'nowhere'"):
        pipeline(None, tmp_path, custom("a", "nowhere:run")).check()


def test_an_unknown_function_is_found_by_the_check(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.a\.method\.function: .* has no 'nothing'"):
        run(None, tmp_path, custom("a", "json:nothing"))


def test_a_preprocessor_changes_the_rows_before_they_are_trained_on(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage("a", rows, max_steps=1, data_preprocessor="tests.answers:doubled")
    assert run(tiny_model_path, tmp_path, only)["a"].samples_trained == 32
