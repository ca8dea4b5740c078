"""The evaluation stage through a pipeline on the tiny model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagekit.adapters import Evaluation
from stagekit.groups import LoRA
from stagekit.stage import TrainingStage
from tests.running import run, stage


def measure(name: str, rows: str, **options: Any) -> TrainingStage:
    return TrainingStage(name=name, method=Evaluation(), validation_data=rows, **options)


@pytest.fixture
def rows(write_rows: Callable[..., Path], sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows))


def test_the_loss_is_that_of_the_completions_worked_out_by_hand(
    rows: str, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, measure("m", rows, batch_size=1))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_path),
        AutoTokenizer.from_pretrained(tiny_model_path),
    )
    losses = []
    for row in sft_rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        with torch.no_grad():
            losses.append(float(model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss))
    expected = sum(losses) / len(losses)
    assert result["m"].metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["m"].metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_an_evaluation_writes_numbers_and_no_model(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    result = run(tiny_model_path, tmp_path, measure("m", rows, metrics_to_track=("accuracy",)))
    assert result["m"].metrics.keys() == {"eval_mean_token_accuracy"}
    assert (result["m"].steps, result["m"].samples_trained, dict(result["m"].artifacts)) == (0, 0, {})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_adapter_is_measured_as_it_came_in(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    first = stage("a", rows, max_steps=4, learning_rate=1e-2, lora=LoRA(rank=4, alpha=8, dropout=0.5, merge=False))
    merged = stage("b", rows, max_steps=4, learning_rate=1e-2, lora=LoRA(rank=4, alpha=8, dropout=0.5, merge=True))
    adapter = run(tiny_model_path, tmp_path / "a", first, measure("m", rows))
    full = run(tiny_model_path, tmp_path / "b", merged, measure("m", rows))
    base = run(tiny_model_path, tmp_path / "c", measure("m", rows))
    assert adapter["m"].metrics["eval_loss"] == pytest.approx(full["m"].metrics["eval_loss"], rel=1e-5)
    assert adapter["m"].metrics["eval_loss"] < base["m"].metrics["eval_loss"]


def test_your_own_metrics_are_in_the_result(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    def parameters(model: Any, dataset: Any) -> dict[str, float]:
        return {"parameters": sum(p.numel() for p in model.parameters()), "rows": len(dataset)}

    result = run(tiny_model_path, tmp_path, measure("m", rows, custom_evaluation_function=parameters))
    assert result["m"].metrics["eval_rows"] == 16
    assert result["m"].metrics["eval_parameters"] > 1e4
