"""What the training options of a stage do: checkpoints, the best of them, stopping, metrics, what is dropped."""

import json
import math
import os
import random
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from stagekit.adapters import DPO
from stagekit.errors import ConfigError, StageError
from stagekit.groups import EarlyStopping, LoRA
from stagekit.stage import TrainingStage
from tests.running import CrashError, lines, run, same, stage


Write = Callable[..., Path]


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any], preference_rows: list[Any]) -> dict[str, str]:
    return {"sft": str(write_rows(sft_rows, "sft.jsonl")), "dpo": str(write_rows(preference_rows, "dpo.jsonl"))}


def checkpoints(folder: Path) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in (folder / "01-s/checkpoints").glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(3, 1, {3, 4, 6, 8}), (3, 0, {3, 6, 8}), (0, 1, {4, 8}), (0, 2, {8}), (0, 0, set())],
)
def test_t52_checkpoints_come_by_steps_and_by_epochs(
    steps: int, epochs: int, expected: set[int], data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T52: TRL knows one kind at a time."""
    options = {"checkpoint_save_steps": steps, "checkpoint_save_epochs": epochs, "max_checkpoints_to_keep": 9}
    run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=0, epochs=2, **options))
    assert checkpoints(tmp_path) == expected


def test_older_checkpoints_are_deleted(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    run(tiny_model_path, tmp_path, stage("s", data["sft"], checkpoint_save_steps=2, max_checkpoints_to_keep=2))
    assert checkpoints(tmp_path) == {6, 8}


@pytest.mark.parametrize("lora", [..., LoRA(rank=4, alpha=8, dropout=0)], ids=["full", "lora"])
def test_t53_save_only_best_passes_the_best_checkpoint_on(
    lora: Any, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T53: the trainer ends with the last weights."""
    result = run(
        tiny_model_path,
        tmp_path,
        stage(
            "s",
            data["dpo"],
            DPO(),
            validation_data=data["dpo"],
            evaluation_steps=2,
            save_only_best=True,
            checkpoint_save_steps=...,
            best_checkpoint_metric="custom",
            custom_metric_name="peak",
            best_checkpoint_metric_maximize=True,
            custom_evaluation_function=Peak(at=3),
            early_stopping=None,
            lora=lora,
        ),
    )
    assert result["s"].steps == 8
    assert checkpoints(tmp_path) == {6}  # the third of four evaluations
    assert same(str(result.policy), tmp_path / "01-s/checkpoints/checkpoint-6")
    assert {line["eval_peak"] for line in lines(tmp_path / "01-s") if "eval_peak" in line} == {0.0, 1.0}


class Peak:
    """An evaluation that gives 1 at its nth call and 0 otherwise."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, model: Any, dataset: Any) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert len(dataset) == 16
        self.calls += 1
        return {"peak": float(self.calls == self.at)}


def test_t55_early_stopping_sees_the_users_own_metric(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T55: a metric that is added in `evaluate` comes too late."""
    result = run(
        tiny_model_path,
        tmp_path,
        stage(
            "s",
            data["sft"],
            validation_data=data["sft"],
            evaluation_steps=1,
            custom_evaluation_function=Peak(at=2),
            early_stopping=EarlyStopping(patience=3, metric="peak", maximize=True),
        ),
    )
    assert (result["s"].status, result["s"].steps) == ("completed", 5)
    assert result["s"].metrics.keys() == {"train_loss", "train_runtime", "eval_loss", "eval_perplexity", "eval_peak"}


@pytest.mark.parametrize(
    ("tracked", "expected"),
    [
        (("loss",), {"eval_loss"}),
        (("accuracy",), {"eval_mean_token_accuracy"}),
        (("loss", "perplexity", "accuracy"), {"eval_loss", "eval_perplexity", "eval_mean_token_accuracy"}),
        (("loss", "peak"), {"eval_loss", "eval_peak"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_metrics_to_track_says_which_metrics_are_kept(
    tracked: tuple[str, ...], expected: set[str], data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    own = {"custom_evaluation_function": Peak(at=1)}
    only = stage("s", data["sft"], max_steps=1, validation_data=data["sft"], metrics_to_track=tracked, **own)
    result = run(tiny_model_path, tmp_path, only)
    assert {name for name in result["s"].metrics if name.startswith("eval_")} == expected
    logged = {name for line in lines(tmp_path / "01-s") for name in line if name.startswith("eval_")}
    governed = {"eval_loss", "eval_perplexity", "eval_mean_token_accuracy", "eval_peak"}
    assert logged & governed == expected
    assert "eval_entropy" in logged
    if "eval_perplexity" in expected:
        assert result["s"].metrics["eval_perplexity"] == math.exp(result["s"].metrics["eval_loss"])


def test_a_tracked_metric_that_the_function_does_not_return_stops_the_stage(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    own = {"custom_evaluation_function": Peak(at=1), "metrics_to_track": ("f1",)}
    with pytest.raises(StageError, match=r"stage 's': metrics_to_track: 'f1' was not measured; .* returned peak"):
        run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=1, validation_data=data["sft"], **own))


def test_what_is_not_tracked_still_decides_on_the_best_checkpoint(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    options = {"save_only_best": True, "best_checkpoint_metric": "perplexity", "checkpoint_save_steps": ...}
    only = stage(
        "s", data["sft"], validation_data=data["sft"], evaluation_steps=4, metrics_to_track=("loss",), **options
    )
    result = run(tiny_model_path, tmp_path, only)
    assert result["s"].status == "completed"
    assert checkpoints(tmp_path) == {8}


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        ({}, {"loss", "learning_rate"}, {"grad_norm"}),
        ({"log_gradient_norms": True}, {"loss", "learning_rate", "grad_norm"}, set()),
        ({"log_learning_rate": False}, {"loss"}, {"learning_rate", "grad_norm"}),
    ],
    ids=["default", "with norms", "without rate"],
)
def test_the_log_holds_what_the_stage_asks_for(
    options: dict[str, bool],
    there: set[str],
    absent: set[str],
    data: dict[str, str],
    tiny_model_path: str,
    tmp_path: Path,
) -> None:
    run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=2, **options))
    first = lines(tmp_path / "01-s")[0]
    assert there <= first.keys()
    assert not absent & first.keys()


def test_no_log_lines_with_logging_steps_0(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    result = run(tiny_model_path, tmp_path, stage("s", data["sft"], logging_steps=0))
    assert [line["step"] for line in lines(tmp_path / "01-s")] == [8]  # the summary
    assert result["s"].metrics["train_loss"] > 0


def test_t54_max_duration_stops_the_stage_and_the_result_is_kept(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage("s", data["sft"], max_duration=timedelta(milliseconds=1))
    result = run(tiny_model_path, tmp_path, only)
    assert (result["s"].status, result["s"].reason, result["s"].steps) == ("stopped", "max_duration", 1)
    assert same(str(result.policy), tmp_path / "01-s/checkpoints/checkpoint-1")
    assert run(tiny_model_path, tmp_path, only) == result


def test_a_stage_that_ran_out_of_time_goes_on_from_its_checkpoint_where_it_has_more(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    def two(limit: str | None) -> tuple[Any, Any]:
        return stage("s", data["sft"], max_duration=limit), stage("after", data["sft"], max_steps=2)

    whole = run(tiny_model_path, tmp_path / "whole", *two(None))
    short = run(tiny_model_path, tmp_path / "run", *two("0.002s"))
    assert (short["s"].status, short["s"].steps) == ("stopped", 1)
    assert run(tiny_model_path, tmp_path / "run", *two("0.001s")) == short, "less time is no reason to start again"

    longer = run(tiny_model_path, tmp_path / "run", *two("0.003s"))
    assert (longer["s"].status, longer["s"].steps) == ("stopped", 2), "one step further, from the checkpoint"
    more = run(tiny_model_path, tmp_path / "run", *two("1h"))
    assert (more["s"].status, more["s"].steps) == ("completed", 8)
    assert [line["step"] for line in lines(tmp_path / "run/01-s") if "loss" in line] == list(range(1, 9))
    assert same(str(more["s"].policy), str(whole["s"].policy))
    assert same(str(more["after"].policy), str(whole["after"].policy)), "what was trained on the old model is new too"
    assert run(tiny_model_path, tmp_path / "run", *two("1h")) == more


def test_a_stage_that_was_killed_when_its_time_was_up_is_over(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit import training

    def save(*args: Any) -> None:
        raise CrashError("before the policy is saved")

    only = stage("s", data["sft"], max_duration="0.001s")
    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", save)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path, only)
    result = run(tiny_model_path, tmp_path, only)["s"]
    assert (result.status, result.reason, result.steps) == ("stopped", "max_duration", 1)


def test_rate_and_betas_in_trl_reach_an_optimiser_that_trl_has_no_name_for(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    adam = {"optimizer_override": "adam", "scheduler_type": "step", "max_steps": 3}
    own = stage("s", data["sft"], learning_rate=1e-2, adam_beta1=0.5, **adam)
    trl = stage("s", data["sft"], learning_rate=..., trl={"learning_rate": 1e-2, "adam_beta1": 0.5}, **adam)
    first, second = run(tiny_model_path, tmp_path / "own", own), run(tiny_model_path, tmp_path / "trl", trl)
    assert same(str(first.policy), str(second.policy))
    assert lines(tmp_path / "trl/01-s")[1]["learning_rate"] == 1e-2


def test_t23_an_evaluation_only_stage_changes_no_weight_and_makes_no_policy(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T23: TRL asks for training data."""
    measured = TrainingStage(
        name="s",
        method=DPO(),
        is_evaluation_only=True,
        validation_data=data["dpo"],
        metrics_to_track=("loss", "accuracy"),
    )
    result = run(tiny_model_path, tmp_path, measured)
    assert result["s"].metrics == {
        "eval_loss": pytest.approx(math.log(2), abs=1e-6),
        "eval_rewards/accuracies": 0.0,
    }
    assert (result["s"].steps, result["s"].policy) == (0, None)
    assert not (tmp_path / "01-s/policy").exists()


def test_t24_rows_that_are_too_long_are_counted(
    preference_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T24: DPO drops rows whose prompt fills max_length, without a word."""
    long = {**preference_rows[0], "prompt": [{"role": "user", "content": "word " * 200}]}
    rows = write_rows([*preference_rows, long, long])
    result = run(tiny_model_path, tmp_path, stage("s", str(rows), DPO(), max_steps=1, trl={"max_length": 128}))
    assert result["s"].samples_dropped == {"too_long": 2}
    assert result["s"].samples_trained == 16


def test_t24_rows_without_a_token_to_learn_from_are_counted(
    sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T24: SFT drops rows whose completion is cut off."""
    long = {**sft_rows[0], "prompt": [{"role": "user", "content": "word " * 200}]}
    rows = write_rows([*sft_rows, long])
    result = run(tiny_model_path, tmp_path, stage("s", str(rows), max_steps=1, trl={"max_length": 128}))
    assert result["s"].samples_dropped == {"too_long": 1}


@pytest.mark.parametrize(
    ("method", "options"),
    [("sft", {}), ("dpo", {}), ("dpo", {"lora": LoRA(rank=2, alpha=4)})],
    ids=["sft", "dpo", "dpo-lora"],
)
def test_t24_no_row_left_is_an_error_that_names_the_stage_and_the_way_out(
    method: str,
    options: dict[str, Any],
    sft_rows: list[Any],
    preference_rows: list[Any],
    write_rows: Write,
    tiny_model_path: str,
    tmp_path: Path,
) -> None:
    """Trap T24: with nothing left TRL fails somewhere else."""
    rows = write_rows(sft_rows if method == "sft" else preference_rows)
    only = stage("s", str(rows), method, trl={"max_length": 4}, **options)
    with pytest.raises(
        StageError, match=r"stage 's'.*none of .*rows is left.*max_length \(4\)\. Raise trl\.max_length"
    ):
        run(tiny_model_path, tmp_path, only)


def test_the_seed_decides_on_the_first_weights_of_an_adapter(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 1, "lora": LoRA(rank=2, alpha=4)}
    results = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        only = stage("s", data["sft"], random_seed=seed, data_shuffle_seed=7, **options)
        results.append(str(run(tiny_model_path, tmp_path / str(number), only).policy))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_a_run_leaves_the_callers_process_as_it_was(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    def settings() -> list[Any]:
        return [
            dict(os.environ),
            list(warnings.filters),
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            datasets.are_progress_bars_disabled(),
            datasets.is_caching_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
            random.getstate(),
            str(np.random.get_state()),
            torch.random.get_rng_state().tolist(),
        ]

    transformers_logging.set_verbosity_error()
    before = settings()
    run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=1))
    after = settings()
    transformers_logging.set_verbosity_warning()
    assert after == before


def test_t35_fp16_without_a_gpu_is_refused_before_anything_is_loaded(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T35: it would silently be float32."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    only = stage("s", data["sft"], use_mixed_precision=True, mixed_precision_dtype="fp16")
    with pytest.raises(ConfigError, match=r"stages\.s\.mixed_precision_dtype: 'fp16' runs on no CPU"):
        run(tiny_model_path, tmp_path, only)


def test_the_data_folder_gets_no_derived_files(sft_rows: list[Any], tiny_model_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(sft_rows).save_to_disk(str(folder))
    before = sorted(path.name for path in folder.iterdir())
    run(tiny_model_path, tmp_path / "run", stage("s", str(folder), max_steps=1))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_plan_of_a_stage_stands_beside_its_result(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=1))
    plan = json.loads((tmp_path / "01-s/plan.json").read_text())
    settings = {entry["target"]: (entry["value"], entry["source"]) for entry in plan["settings"]}
    assert settings["learning_rate"] == (1e-3, "stages.s.learning_rate")
    assert settings["weight_decay"] == (0.01, "default")
    assert (plan["trainer"], plan["config"]) == ("trl:SFTTrainer", "trl:SFTConfig")
    assert {entry["option"] for entry in plan["ledger"]} >= set(TrainingStage.model_fields)
