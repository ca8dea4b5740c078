"""How many steps a stage takes, in which order its rows come, and at which rates: seen in the trainer's own loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stagekit import ConfigError, TrainingStage
from stagekit.plan import plan
from tests.every_option import Case, curve
from tests.option_pairs import Place, trained, write_files
from tests.running import lines, pipeline, run, stage


PEAK = 1e-3


@pytest.fixture
def rows(write_rows: Callable[..., Path], sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows))


@pytest.fixture
def place(tmp_path: Path, tiny_model_path: str, sft_rows: list[Any], preference_rows: list[Any]) -> Place:
    return Place(tmp_path / "run", tiny_model_path, write_files(tmp_path, sft_rows, preference_rows))


def rates(folder: Path) -> list[float]:
    """The rate of each step."""
    return [line["learning_rate"] for line in lines(folder) if "learning_rate" in line]


def last_rate(folder: Path, step: int) -> float:
    """The rate that one more step would have had."""
    state = torch.load(folder / f"checkpoints/checkpoint-{step}/scheduler.pt", weights_only=True)
    return float(state["_last_lr"][0])


@pytest.mark.parametrize("limit", [0, ...], ids=["0", "unset"])
def test_t13_no_limit_of_steps_is_every_epoch_and_not_one_step(
    limit: Any, rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, stage("s", rows, max_steps=limit, epochs=2))
    assert result["s"].steps == 2 * 4  # 16 rows, 4 at a time


def test_t14_max_steps_overrides_the_epochs_upwards_too_and_the_plan_says_so(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    longer = stage("s", rows, max_steps=10, epochs=1)
    (entry,) = plan(pipeline(tiny_model_path, tmp_path, longer))
    assert entry["steps"] == 10
    assert run(tiny_model_path, tmp_path, longer)["s"].steps == 10
    assert max(line["epoch"] for line in lines(tmp_path / "01-s")) == 2.5
    assert len(rates(tmp_path / "01-s")) == 10, "the schedule is that of ten steps"
    assert last_rate(tmp_path / "01-s", 10) == 0.0


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "cpo", "reward", "process_reward"])
def test_t21_the_order_of_rows_is_the_data_seeds_alone_and_that_of_the_data_without_a_shuffle(
    kind: str, place: Place
) -> None:
    def order(**given: Any) -> list[Any]:
        _, trainer = trained(place, place.stage(kind, Case({}, {}, curve), given, batch_size=4))
        batches = list(trainer.get_train_dataloader())
        (ids,) = [key for key in batches[0] if key in {"input_ids", "completion_input_ids"}]
        return [row for batch in batches for row in batch[ids].tolist()]

    seeded = order(data_shuffle_seed=1)
    assert seeded == order(data_shuffle_seed=1, random_seed=7)
    assert seeded != order(data_shuffle_seed=2)
    plain = order(shuffle_data=False)
    assert plain == order(shuffle_data=False, random_seed=7)
    assert plain != seeded


def test_t25_a_share_of_warm_up_is_that_share_of_the_steps_and_never_all_of_them(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    run(tiny_model_path, tmp_path, stage("s", rows, warmup_ratio=0.5, scheduler_type="linear_warmup"))
    climb, fall = [0, 1, 2, 3], [4, 3, 2, 1]
    assert rates(tmp_path / "01-s") == pytest.approx([PEAK * one / 4 for one in climb + fall])
    with pytest.raises(ConfigError, match="leaves no step to train at the full rate"):
        stage("s", rows, warmup_ratio=1.0)


FALLING = ["cosine_annealing", "cosine_annealing_warm_restarts", "linear_warmup", "polynomial"]
FLOORED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FALLING), ("one_cycle", {}), ("cyclic", {}), ("step", {}), ("multi_step", {}),
    ("exponential", {"gamma": 1e-3}),
]  # fmt: skip


@pytest.mark.parametrize("name", FALLING)
def test_t26_t27_without_a_floor_the_rate_falls_to_zero_and_never_climbs_again(
    name: str, rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    options = {"scheduler_type": name, "warmup_ratio": 0, "checkpoint_save_steps": 8}
    run(tiny_model_path, tmp_path, stage("s", rows, **options))
    found = rates(tmp_path / "01-s")
    assert found[0] == PEAK
    assert found == sorted(found, reverse=True)
    assert last_rate(tmp_path / "01-s", 8) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("name", "kwargs"), FLOORED)
def test_t27_every_schedule_that_has_a_floor_ends_on_it(
    name: str, kwargs: dict[str, Any], rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    options = {"scheduler_type": name, "scheduler_kwargs": kwargs, "min_learning_rate": 1e-4}
    climbs = {} if name in {"one_cycle", "cyclic"} else {"warmup_steps": 1}
    run(tiny_model_path, tmp_path, stage("s", rows, checkpoint_save_steps=8, **options, **climbs))
    assert last_rate(tmp_path / "01-s", 8) == pytest.approx(1e-4)


def test_t28_a_constant_rate_has_its_warm_up_and_a_plateau_refuses_one(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    run(tiny_model_path, tmp_path, stage("s", rows, scheduler_type="constant", warmup_steps=2))
    assert rates(tmp_path / "01-s") == pytest.approx([0.0, PEAK / 2, *[PEAK] * 6])
    with pytest.raises(ConfigError, match="warmup_steps"):
        stage("s", rows, scheduler_type="reduce_on_plateau", validation_data=rows, warmup_steps=2)


class Series:
    """An evaluation that gives one number after the other."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, model: Any, dataset: Any) -> dict[str, float]:
        return {"skill": self.values.pop(0)}


@pytest.mark.parametrize(
    ("maximize", "values", "falls"),
    [(True, [0.1, 0.2, 0.3, 0.4], False), (True, [0.4, 0.3, 0.2, 0.1], True),
     (False, [0.1, 0.2, 0.3, 0.4], True), (False, [0.4, 0.3, 0.2, 0.1], False)],
)  # fmt: skip
def test_t29_a_plateau_lowers_the_rate_only_where_the_metric_gets_worse(
    maximize: bool, values: list[float], falls: bool, rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage(
        "s", rows, max_steps=4, validation_data=rows, evaluation_steps=1, custom_evaluation_function=Series(values),
        scheduler_type="reduce_on_plateau", scheduler_kwargs={"patience": 0, "factor": 0.5}, save_only_best=True,
        best_checkpoint_metric="custom", custom_metric_name="skill", best_checkpoint_metric_maximize=maximize,
        checkpoint_save_steps=..., early_stopping=None,
    )  # fmt: skip
    run(tiny_model_path, tmp_path, only)
    expected = [PEAK, PEAK, PEAK / 2, PEAK / 4] if falls else [PEAK] * 4
    assert rates(tmp_path / "01-s") == pytest.approx(expected)


def test_t48_the_plan_says_whose_default_the_learning_rate_is(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    def told(kind: str, **given: Any) -> tuple[float, str]:
        one = TrainingStage(name="s", method=kind, training_data=rows, **given)
        (entry,) = plan(pipeline(tiny_model_path, tmp_path, one))
        (found,) = [argument for argument in entry["arguments"] if argument["argument"] == "learning_rate"]
        return found["value"], found["source"]

    assert told("sft") == (2e-5, "default of sft")
    assert told("dpo") == (1e-6, "default of dpo")
    assert told("dpo", lora={}) == (1e-5, "default of dpo, times 10 with lora")
    assert told("dpo", learning_rate=2e-5) == (2e-5, "stages.s.learning_rate")
