"""The plan: rows, steps and memory as numbers that can be worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from stagekit import DPO, SFT, Constitutional, LoRA, TrainingPipeline, TrainingStage
from stagekit.plan import as_text, plan
from tests.running import lines, run


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


def notes(rows: str, model: str, **given: Any) -> list[str]:
    given = {"training_data": rows, "batch_size": 2, "epochs": 1, **given}
    stage = TrainingStage(name="s", **{key: value for key, value in given.items() if value is not None})
    (entry,) = plan(TrainingPipeline(model=model, stages=(stage,)))
    return list(entry["notes"])


def test_arguments_in_trl_count_for_the_steps(rows: str, tiny_model_path: str) -> None:
    given = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 4}
    stage = TrainingStage(name="s", training_data=rows, trl=given)
    assert plan(TrainingPipeline(model=tiny_model_path, stages=(stage,)))[0]["steps"] == 4
    stage = TrainingStage(name="s", training_data=rows, trl={"max_steps": 7})
    assert plan(TrainingPipeline(model=tiny_model_path, stages=(stage,)))[0]["steps"] == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer_override": "sgd"}, "learning_rate 2e-05 is far below what is usual for 'sgd' (about 0.01)"),
        ({"optimizer_override": "sgd", "learning_rate": 1e-3}, None),
        ({"optimizer_override": "sgd", "trl": {"learning_rate": 1e-3}}, None),
        ({"optimizer_override": "adadelta", "learning_rate": 1e-3}, "usual for 'adadelta' (about 1)"),
        ({}, None),
        ({"trl": {"optim": "sgd"}}, None),
    ],
)
def test_a_rate_far_below_the_optimiser_s_own_is_told(
    given: dict[str, Any], said: str | None, rows: str, tiny_model_path: str
) -> None:
    found = notes(rows, tiny_model_path, **given)
    assert [said in note for note in found] == [True] if said is not None else found == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_steps": 1}, "the only step, at a learning rate of 0"),
        ({"max_steps": 1, "warmup_ratio": 0}, None),
        ({"max_steps": 1, "scheduler_type": "one_cycle"}, None),  # climbs by itself
        (
            {"max_steps": 4, "warmup_steps": 4, "learning_rate": 1e-3},
            "climbs from 0 to 0.00075 and never reaches 0.001",
        ),
        ({"max_steps": 4, "warmup_steps": 3}, None),
        ({"warmup_steps": 8}, "warm-up takes all 5 steps"),  # 10 rows, 2 at a time
        ({"max_steps": 2}, None),
        ({"max_steps": 4, "warmup_steps": 8, "trl": {"lr_scheduler_type": "constant"}}, None),
        ({"is_evaluation_only": True}, None),
    ],
)
def test_a_warm_up_that_never_ends_is_told(
    given: dict[str, Any], said: str | None, rows: str, tiny_model_path: str
) -> None:
    if "is_evaluation_only" in given:
        given = {**given, "training_data": None, "epochs": None, "validation_data": rows}
    found = notes(rows, tiny_model_path, **given)
    assert [said in note for note in found] == [True] if said is not None else found == []


def test_the_rates_of_a_warm_up_that_never_ends_are_those_of_the_trainer(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    given = {"batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    only = TrainingStage(name="only", training_data=rows, max_steps=1, **given)
    climb = TrainingStage(name="climb", training_data=rows, max_steps=4, warmup_steps=4, **given)
    run(tiny_model_path, tmp_path / "run", only, climb)
    rates = [[line["learning_rate"] for line in lines(tmp_path / "run" / name) if "loss" in line]
             for name in ("01-only", "02-climb")]  # fmt: skip
    assert rates == [[0.0], pytest.approx([0.0, 0.00025, 0.0005, 0.00075])]


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
