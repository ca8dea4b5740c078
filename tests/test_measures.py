"""Which metrics a stage measures: what is asked for without what it needs is told by the declaration or by `check`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import ConfigError, TrainingPipeline, TrainingStage
from stagekit.groups import EarlyStopping
from tests.running import lines, pipeline, run, stage
from tests.test_text_metrics import COMPARED, length, measure


Write = Callable[..., Path]


@pytest.fixture
def rows(write_rows: Write, sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows, "sft.jsonl"))


@pytest.fixture
def preferences(write_rows: Write, preference_rows: list[Any]) -> str:
    return str(write_rows(preference_rows, "dpo.jsonl"))


def problems(**given: Any) -> dict[str, str]:
    base = {"name": "s", "training_data": "t.jsonl", "validation_data": "v.jsonl", "method": "sft"}
    try:
        TrainingStage(**{**base, **given})
    except ConfigError as error:
        return {problem.path: problem.message for problem in error.problems}
    return {}


BEST = {"save_only_best": True, "best_checkpoint_metric": "rouge"}
ONE_SCORER = "missing; reward_score needs one: stage:NAME of a reward stage, a folder, a hub id, or a function"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"metrics_to_track": ["reward_score"]}, {"text_metrics.reward_model": ONE_SCORER}),
        ({"metrics_to_track": ["win_rate"]},
         {"text_metrics.judge": "missing; win_rate needs one: a function, or a reward model as "
                                "text_metrics.reward_model, whose higher score wins"}),
        ({"early_stopping": {"metric": "reward_score", "maximize": True}}, {"text_metrics.reward_model": ONE_SCORER}),
        ({"metrics_to_track": ["bleu"], "text_metrics": {"judge": "a.b:c"}},
         {"text_metrics.judge": "has no effect: win_rate is not asked for"}),
        ({"metrics_to_track": ["bleu"], "text_metrics": {"reward_model": "a.b:c"}},
         {"text_metrics.reward_model": "has no effect: reward_score is not asked for, and nor is win_rate"}),
        ({"metrics_to_track": ["win_rate"], "text_metrics": {"reward_model": "a.b:c", "judge": "a.b:c"}},
         {"text_metrics.reward_model": "has no effect: reward_score is not asked for, and text_metrics.judge decides "
                                       "on win_rate"}),
        ({"text_metrics": {"samples": 5}},
         {"text_metrics": "has no effect: none of f1_score, bleu, rouge, reward_score, win_rate is in "
                          "metrics_to_track"}),
        ({"metrics_to_track": ["bleu"], "evaluation_steps": 0},
         {"metrics_to_track": "'bleu' is never measured with evaluation_steps: 0"}),
        (BEST, {"best_checkpoint_metric_maximize": "must be true with best_checkpoint_metric: rouge, of which more is "
                                                   "better"}),
        ({"early_stopping": {"metric": "eval_f1_score"}},
         {"early_stopping.maximize": "must be true with early_stopping.metric: f1_score, of which more is better"}),
        ({"early_stopping": {"metric": "f1_scor", "maximize": True}},
         {"early_stopping.metric": "'f1_scor' is no metric of 'sft'; did you mean 'f1_score'? (others come from "
                                   "custom_evaluation_function)"}),
        ({"method": "kto", "early_stopping": {"metric": "accuracy"}},
         {"early_stopping.metric": "'accuracy' is no metric of 'kto'; it has aux_loss, bleu, entropy, f1_score, kl, "
                                   "logits/chosen, logits/rejected, logps/chosen, logps/rejected, loss, reward_score, "
                                   "rewards/chosen, rewards/margins, rewards/rejected, rouge, win_rate (others come "
                                   "from custom_evaluation_function)"}),
        ({"method": "reward", "text_metrics": {}},
         {"text_metrics": "has no effect here: stage type 'reward' has no use for it; it belongs to sft, dpo, kto, "
                          "orpo, cpo, simpo, constitutional, evaluation"}),
        ({"metrics_to_track": ["bleu"], "text_metrics": {"reward_model": 5}},
         {"text_metrics.reward_model": "is stage:NAME, a folder, a hub id or a function, not 5; save a live model "
                                       "first"}),
    ],
)  # fmt: skip
def test_a_metric_without_what_it_needs_is_told_with_path_and_way_out(
    given: dict[str, Any], expected: dict[str, str]
) -> None:
    assert problems(**given) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"metrics_to_track": ["loss", *COMPARED]},
        {**BEST, "best_checkpoint_metric_maximize": True},
        {"metrics_to_track": ["win_rate", "reward_score"], "text_metrics": {"reward_model": "some/model"}},
        {"metrics_to_track": ["win_rate"], "text_metrics": {"judge": length, "samples": 3}},
        {"early_stopping": {"metric": "win_rate", "maximize": True}, "text_metrics": {"reward_model": "a.b:c"}},
        {"method": "kto", "batch_size": 4, "early_stopping": {"metric": "kl"}},
        {"method": "constitutional", "metrics_to_track": ["bleu"], "text_metrics": {"batch_tokens": 512}},
        {"method": "evaluation", "training_data": None, "metrics_to_track": ["bleu"]},
        {"is_evaluation_only": True, "training_data": None, "metrics_to_track": ["bleu"], "evaluation_steps": 0},
    ],
)
def test_what_fits_together_is_accepted(given: dict[str, Any]) -> None:
    assert problems(**given) == {}


def test_a_missing_library_and_data_without_prompts_are_found_by_check(
    rows: str, write_rows: Write, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    gone = {"sacrebleu", "rouge_score"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in gone else original(name, *more)
    )
    early = EarlyStopping(metric="rouge", maximize=True)
    text = str(write_rows([{"text": "a"}], "text.jsonl"))
    only = stage(
        "s",
        rows,
        validation_data=text,
        evaluation_steps=1,
        metrics_to_track=("bleu", "f1_score"),
        early_stopping=early,
    )
    with pytest.raises(ConfigError) as caught:
        pipeline(tiny_model_path, tmp_path, only).check()
    told = {problem.path: problem.message for problem in caught.value.problems}
    installs = 'which is not installed; run pip install "trl-stagekit[metrics]"'
    assert (
        told.pop("stages.s.validation_data")
        .partition("found text")[0]
        .endswith("needs columns (messages) or (prompt, completion) or (conversations); ")
    )
    assert told == {
        "stages.s.metrics_to_track": f"'bleu' needs sacrebleu, {installs}",
        "stages.s.early_stopping.metric": f"'rouge' needs rouge-score, {installs}",
    }


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("stage:sft", "sft stage 'sft' leaves a policy, not a reward model that scores answers; name a reward stage"),
        ("stage:prm", "process_reward stage 'prm' leaves a reward_model, not a reward model that scores answers; name "
                      "a reward stage"),
        ("stage:m", "stage 'm' is this one; only results of earlier stages can be used"),
        ("stage:sftt", "no stage 'sftt' before this one; did you mean 'sft'?"),
        ("stage:rm", ""),
    ],
)  # fmt: skip
def test_who_scores_is_a_reward_stage_before(named: str, told: str, rows: str, tmp_path: Path) -> None:
    before = [stage(name, rows, kind) for name, kind in (("sft", "sft"), ("rm", "reward"), ("prm", "process_reward"))]
    only = measure(rows, metrics_to_track=("reward_score",), text_metrics={"reward_model": named})
    try:
        TrainingPipeline(name="t", model="some/model", output_dir=tmp_path, stages=(*before, only))
        found = {}
    except ConfigError as error:
        found = {problem.path: problem.message for problem in error.problems}
    assert found == ({"stages.m.text_metrics.reward_model": told} if told else {})


def test_a_reward_model_and_functions_that_are_not_there_are_found_by_check(rows: str, tmp_path: Path) -> None:
    options = {"reward_model": "./nowhere", "judge": "tests.running:nobody"}
    only = measure(rows, metrics_to_track=("reward_score", "win_rate"), text_metrics=options)
    with pytest.raises(ConfigError) as caught:
        TrainingPipeline(name="t", model="some/model", output_dir=tmp_path, stages=(only,)).check()
    told = {problem.path: problem.message for problem in caught.value.problems}
    assert told.keys() == {"stages.m.text_metrics.reward_model", "stages.m.text_metrics.judge"}
    assert "does not exist" in told["stages.m.text_metrics.reward_model"]


CHANGING = {"aux_loss"}
"""Told only by models with experts."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward"])
def test_what_early_stopping_may_watch_is_what_the_trainer_tells(
    kind: str, rows: str, preferences: str, tiny_model_path: str, tmp_path: Path
) -> None:
    """`check` refuses other names, so none of the trainer's may be missing."""
    data = rows if kind == "sft" else preferences
    run(tiny_model_path, tmp_path, stage("s", data, kind, max_steps=1, validation_data=data, evaluation_steps=1))
    told = {name.removeprefix("eval_") for line in lines(tmp_path / "01-s") for name in line if name[:5] == "eval_"}
    method = TrainingStage(name="s", method=kind, training_data=data).method
    named = {key.removeprefix("eval_") for key in method.metric_keys.values() if key}
    silent = {"num_tokens", "model_preparation_time"}
    assert told - silent <= named | method.reports | {"perplexity"}
    assert method.reports - CHANGING <= told
