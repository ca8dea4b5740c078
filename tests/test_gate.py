"""The gate: what must hold for a stage's model to be passed on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import ConfigError, Gate, StageError, TrainingStage
from tests.running import run, same, stage


Write = Callable[..., Path]


@pytest.fixture
def rows(write_rows: Write, sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows))


def problems(**options: Any) -> dict[str, str]:
    try:
        TrainingStage(**{"name": "s", "training_data": "rows.jsonl", **options})
    except ConfigError as error:
        return {problem.path: problem.message for problem in error.problems}
    return {}


@pytest.mark.parametrize(
    ("gate", "passes"),
    [
        ({"metric": "loss", "at_most": 100}, True),
        ({"metric": "eval_loss", "at_most": 100}, True),
        ({"metric": "train_loss", "at_least": 0.1}, True),
        ({"metric": "loss", "at_least": 100}, False),
        ({"metric": "accuracy", "at_least": 1.1}, False),
        ({"metric": "train_loss", "at_most": 0.1}, False),
    ],
    ids=str,
)
def test_the_next_stage_starts_from_what_the_gate_lets_pass(
    gate: dict[str, Any], passes: bool, rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    options = {
        "max_steps": 2,
        "validation_data": rows,
        "metrics_to_track": ("loss", "accuracy"),
        "learning_rate": 1e-2,
    }
    first = stage("first", rows, **options)
    gated = stage("gated", rows, gate=gate, **options)
    last = stage("last", rows, max_steps=1, learning_rate=1e-30)  # as it came in
    result = run(tiny_model_path, tmp_path, first, gated, last)

    assert result["gated"].status == "completed"
    assert (tmp_path / "02-gated/policy/model.safetensors").is_file()
    assert same(str(result.policy), tmp_path / ("02-gated/policy" if passes else "01-first/policy"))
    assert not same(tmp_path / "01-first/policy", tmp_path / "02-gated/policy")
    assert (result["gated"].policy is None) == (not passes)
    assert result["gated"].held_back == (not passes)
    if not passes:
        written = json.loads((tmp_path / "02-gated/result.json").read_text())
        assert written["artifacts"] == {"held_back": "02-gated/policy"}
        assert written["reason"].startswith("gate: ")
        assert written["reason"].endswith("; the model before it is passed on")
    assert run(tiny_model_path, tmp_path, first, gated, last) == result, "all of it stands"


def test_a_first_stage_that_is_held_back_passes_the_pipelines_model_on(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    gate = Gate(metric="train_loss", at_most=0.0)
    first = stage("first", rows, max_steps=2, learning_rate=1e-2, gate=gate)
    result = run(tiny_model_path, tmp_path, first, stage("last", rows, max_steps=1, learning_rate=1e-30))
    assert same(str(result.policy), tiny_model_path)
    assert "train_loss is" in result["first"].reason
    assert "must be at most 0" in result["first"].reason


def test_the_model_before_is_not_deleted_while_a_gate_may_need_it(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    first = stage("first", rows, max_steps=2, learning_rate=1e-2, save_checkpoint_after=False)
    gated = stage("gated", rows, max_steps=1, gate=Gate(metric="train_loss", at_most=0.0))
    last = stage("last", rows, max_steps=1)
    stages = (first, gated, last)
    run(tiny_model_path, tmp_path / "a", *stages, until_stage="gated")
    assert (tmp_path / "a/01-first/policy").exists()
    assert run(tiny_model_path, tmp_path / "a", *stages)["last"].status == "completed"
    assert not (tmp_path / "a/01-first/policy").exists()
    ended = run(tiny_model_path, tmp_path / "b", first, gated)
    assert ended.policy == str(tmp_path / "b/01-first/policy")
    assert Path(ended.policy).exists(), "what the run ends with"


def test_a_gate_that_stops_names_metric_value_and_bound(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    gate = Gate(metric="train_loss", at_most=0.5, otherwise="stop")
    only = stage("s", rows, max_steps=1, gate=gate)
    with pytest.raises(StageError, match=r"stage 's': gate: train_loss is \d+\.\d+, and must be at most 0\.5\."):
        run(tiny_model_path, tmp_path, only)
    assert json.loads((tmp_path / "01-s/result.json").read_text())["status"] == "failed"


def test_an_unknown_metric_is_told_with_those_that_there_are(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    only = stage("s", rows, max_steps=1, gate=Gate(metric="rouge", at_least=1))
    with pytest.raises(
        StageError,
        match=r"stage 's': gate\.metric: no metric 'rouge' was measured; there are: train_loss, train_runtime",
    ):
        run(tiny_model_path, tmp_path, only)


def test_an_evaluation_stage_can_stop_the_run(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    gate = Gate(metric="perplexity", at_most=1.0, otherwise="stop")
    only = TrainingStage(name="s", method="evaluation", validation_data=rows, batch_size=4, gate=gate)
    with pytest.raises(StageError, match="eval_perplexity is"):
        run(tiny_model_path, tmp_path, only)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gate": {"metric": "loss"}}, {"gate": "needs one bound: at_least or at_most"}),
        ({"gate": {"metric": "loss", "at_least": 1, "at_most": 2}}, {"gate": "needs one bound: at_least or at_most"}),
        (
            {
                "gate": {"metric": "loss", "at_least": 1},
                "method": "evaluation",
                "training_data": None,
                "validation_data": "v",
            },
            {"gate.otherwise": "'keep_previous' has no effect: the stage passes on no model; use stop"},
        ),
        ({"gate": {"metric": "loss", "at_least": 1, "otherwise": "stop"}}, {}),
    ],
    ids=str,
)
def test_a_gate_that_can_do_nothing_is_refused(options: dict[str, Any], expected: dict[str, str]) -> None:
    assert problems(**options) == expected


def test_the_flat_names_cannot_say_a_gate() -> None:
    gated = TrainingStage(name="s", training_data="rows.jsonl", gate=Gate(metric="loss", at_most=1))
    with pytest.raises(ConfigError, match=r"stages\.s\.gate: has no flat name; keep the slot spelling"):
        gated.to_flat(only_set=True)
    assert len(gated.to_flat()) == 108
