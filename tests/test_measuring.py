"""When a stage evaluates, what it watches, and which direction is better."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import ConfigError, StageError
from stagekit.arguments import settings_of
from tests.running import lines, run, stage


@pytest.fixture
def rows(write_rows: Callable[..., Path], sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows))


class Own:
    def __call__(self, model: Any, dataset: Any) -> dict[str, float]:
        return {"own": 1.0}


def evaluated(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder) if "eval_loss" in line]


def test_t49_zero_evaluation_steps_are_no_evaluation_and_not_one_per_log_line(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    run(tiny_model_path, tmp_path, stage("s", rows, max_steps=3, validation_data=rows, evaluation_steps=0))
    assert evaluated(tmp_path / "01-s") == []
    run(tiny_model_path, tmp_path, stage("t", rows, max_steps=4, validation_data=rows, evaluation_steps=2))
    assert evaluated(tmp_path / "01-t") == [2, 4]


def test_t49_without_data_to_measure_on_nothing_is_evaluated_and_nothing_stops_early(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    """The defaults are an evaluation every 100 steps and a patience of 5."""
    only = stage("s", rows, max_steps=3)
    assert only.early_stopping is not None
    assert only.evaluation_steps == 100
    assert run(tiny_model_path, tmp_path, only)["s"].steps == 3
    assert evaluated(tmp_path / "01-s") == []


def test_t49_evaluation_steps_that_are_asked_for_need_data(rows: str) -> None:
    with pytest.raises(ConfigError, match="evaluation_steps: has no effect without validation_data"):
        stage("s", rows, evaluation_steps=5)
    with pytest.raises(ConfigError, match="early_stopping: has no effect without validation_data"):
        stage("s", rows, early_stopping={"patience": 1})


def test_t49_a_metric_that_nobody_measures_is_told_with_those_that_are(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"best_checkpoint_metric: must be .*; did you mean 'accuracy'"):
        stage("s", rows, validation_data=rows, save_only_best=True, best_checkpoint_metric="acuracy")
    watched = {"validation_data": rows, "evaluation_steps": 1, "early_stopping": {"metric": "acuracy"}}
    with pytest.raises(ConfigError, match=r"early_stopping\.metric: 'acuracy' .*; did you mean 'accuracy'"):
        stage("s", rows, **watched)
    wrong = stage("s", rows, **watched, custom_evaluation_function=Own())  # which may measure it
    with pytest.raises(StageError, match=r"early_stopping\.metric: no metric 'eval_acuracy' .* eval_loss"):
        run(tiny_model_path, tmp_path, wrong)


def test_t49_the_best_perplexity_is_the_lowest(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    """Left alone, transformers takes every metric for one that is to be high unless its name ends in loss."""
    only = stage(
        "s", rows, validation_data=rows, evaluation_steps=2, max_steps=6, save_only_best=True,
        best_checkpoint_metric="perplexity", checkpoint_save_steps=..., early_stopping=None, learning_rate=5e-3,
    )  # fmt: skip
    given = {setting.target: setting.value for setting in settings_of(only)}
    assert (given["metric_for_best_model"], given["greater_is_better"]) == ("eval_perplexity", False)
    run(tiny_model_path, tmp_path, only)
    found = {line["step"]: line["eval_perplexity"] for line in lines(tmp_path / "01-s") if "eval_perplexity" in line}
    assert len(set(found.values())) == 3
    best = min(found, key=lambda step: found[step])
    kept = [path.name for path in (tmp_path / "01-s/checkpoints").glob("checkpoint-*")]
    assert kept == [f"checkpoint-{best}"]
