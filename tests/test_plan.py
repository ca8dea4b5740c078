"""The plan: rows, steps and memory as numbers that can be worked out by hand."""

import json
from pathlib import Path

import pytest

from stagekit import DPO, SFT, Constitutional, LoRA, TrainingPipeline, TrainingStage
from stagekit.plan import as_text, plan


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(10)))
    return str(path)


def test_steps_are_batches_over_accumulation_times_epochs(rows: str, tiny_model_path: str) -> None:
    stage = TrainingStage(
        name="s", method=SFT(), training_data=rows, batch_size=3, gradient_accumulation_steps=2, epochs=3
    )
    (entry,) = plan(TrainingPipeline(model=tiny_model_path, stages=(stage,)))
    assert entry["rows"]["read"] == 10
    assert entry["steps"] == 2 * 3  # ceil(ceil(10 / 3) / 2) = 2 steps an epoch


def test_max_steps_wins_over_epochs(rows: str, tiny_model_path: str) -> None:
    stage = TrainingStage(name="s", training_data=rows, max_steps=5)
    assert plan(TrainingPipeline(model=tiny_model_path, stages=(stage,)))[0]["steps"] == 5


def test_a_constitutional_stage_counts_a_row_per_round_and_one_per_unrevised_prompt(
    rows: str, tiny_model_path: str
) -> None:
    stage = TrainingStage(
        name="cai",
        method=Constitutional(rounds=2, unrevised=("calm",)),
        training_data={"red": rows, "calm": rows},
        data_mixing_ratios={"red": 3, "calm": 1},
        max_training_samples=8,
        batch_size=4,
        epochs=1,
    )
    after = TrainingStage(name="rl", method=DPO(), training_data="stage:cai/preferences", batch_size=2, epochs=1)
    first, second = plan(TrainingPipeline(model=tiny_model_path, stages=(stage, after)))
    assert first["rows"] == {"read": 8, "trained": 6 * 2 + 2, "made": {"preferences": 6, "revisions": 14}}
    assert second["rows"]["read"] == 6
    assert second["steps"] == 3
    assert second["model"] == "stage:cai"


def test_memory_counts_weights_gradients_and_two_moments(rows: str, tiny_model_path: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    parameters = sum(weight.numel() for weight in model.parameters())
    full = TrainingStage(name="full", training_data=rows)
    lora = TrainingStage(name="lora", training_data=rows, lora=LoRA(rank=4))
    first, second = plan(TrainingPipeline(model=tiny_model_path, stages=(full, lora)))
    assert first["memory"]["at_least"] == 16 * parameters
    # q_proj is 64 -> 64, v_proj 64 -> 32; each pair of matrices has rank * (in + out) weights, in 2 layers
    trained = 4 * ((64 + 64) + (64 + 32)) * 2
    assert second["memory"] == {
        "weights": 4 * parameters,
        "trained_parameters": trained,
        "at_least": 4 * parameters + 12 * trained,
    }


def test_the_text_shows_every_argument_with_its_source(rows: str, tiny_model_path: str) -> None:
    stage = TrainingStage(name="s", training_data=rows, epochs=2, trl={"max_length": 64})
    text = as_text(plan(TrainingPipeline(model=tiny_model_path, stages=(stage,))))
    assert "num_train_epochs" in text
    assert "stages.s.epochs" in text
    assert "stages.s.trl.max_length" in text
    assert "10 rows; prompt, completion" in text
