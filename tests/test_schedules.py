"""Every schedule: its values against closed forms and against transformers' and torch's own, and its arguments."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, get_scheduler
from trl import SFTConfig, SFTTrainer

from stagekit.errors import ConfigError, StageError
from stagekit.schedules import (
    KINDS,
    factor_of,
    make_scheduler,
    plateau_kwargs,
    problems_of_schedule,
)


PEAK, TOTAL, EPOCH = 2e-4, 100, 25
TEN = (0, 1, 9, 10, 24, 25, 50, 75, 99, 100)


def factors(name: str, floor: float = 0.0, warmup: int = 0, total: int = TOTAL, **kwargs: Any) -> list[float]:
    factor = factor_of(
        name,
        peak=PEAK,
        floor=floor,
        warmup_steps=warmup,
        total_steps=total,
        steps_per_epoch=EPOCH,
        kwargs=kwargs,
    )
    return [factor(step) for step in range(total + 1)]


def rates_of(scheduler: Any, optimizer: Any, steps: int) -> list[float]:
    """The rates that a torch scheduler gives, step by step."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "lr_scheduler.step() before optimizer.step()"
        for _ in range(steps + 1):
            found.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return found


def an_optimizer(lr: float = PEAK) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def triangle(step: float, length: float) -> float:
    """0 at the ends of `length`, 1 in its middle."""
    share = (step % length) / length
    return 2 * min(share, 1 - share)


SHAPES: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    "cosine_annealing": ({}, lambda p: (1 + math.cos(math.pi * p)) / 2),
    "cosine_annealing_warm_restarts": (
        {"num_cycles": 4},
        lambda p: 0.0 if p >= 1 else (1 + math.cos(math.pi * (4 * p % 1))) / 2,
    ),
    "polynomial": ({"power": 2.0}, lambda p: (1 - p) ** 2),
    "linear_warmup": ({}, lambda p: 1 - p),
}
"""Name -> arguments and the shape over the share of steps done after the warm-up."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("floor", [0.0, 2e-5])
def test_curves_over_the_whole_run_climb_then_end_on_the_floor(name: str, warmup: int, floor: float) -> None:
    kwargs, shape = SHAPES[name]
    ratio = floor / PEAK
    found = factors(name, floor, warmup, **kwargs)
    for step in TEN:
        expected = step / warmup if step < warmup else ratio + (1 - ratio) * shape((step - warmup) / (TOTAL - warmup))
        assert found[step] == pytest.approx(expected, abs=1e-12), step
    assert found[-1] == pytest.approx(ratio, abs=1e-12)


DROPS: dict[str, tuple[str, dict[str, Any], Callable[[float], float]]] = {
    "step, defaults": ("step", {}, lambda step: 0.1 ** (step // 25)),
    "step, twice per epoch": ("step", {"step_size": 0.5, "gamma": 0.5}, lambda step: 0.5 ** (step // 12.5)),
    "multi_step, defaults": ("multi_step", {}, lambda step: 0.1 ** ((step >= 50) + (step >= 75))),
    "multi_step": (
        "multi_step",
        {"milestones": [1, 3], "gamma": 0.3},
        lambda step: 0.3 ** ((step >= 25) + (step >= 75)),
    ),
}


@pytest.mark.parametrize("case", DROPS)
@pytest.mark.parametrize("warmup", [0, 10, 30])
@pytest.mark.parametrize("floor", [0.0, 4e-6])
def test_drops_stand_where_the_epochs_do_whatever_the_warmup(case: str, warmup: int, floor: float) -> None:
    name, kwargs, drop = DROPS[case]
    found = factors(name, floor, warmup, **kwargs)
    for step in TEN:
        climb = min(1.0, step / warmup) if warmup else 1.0
        assert found[step] == pytest.approx(climb * max(floor / PEAK, drop(step)), rel=1e-12), step


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("floor", [0.0, 1.5e-4])
def test_exponential_loses_a_share_per_epoch_from_the_end_of_the_warmup_on(warmup: int, floor: float) -> None:
    found = factors("exponential", floor, warmup, gamma=0.8)
    for step in TEN:
        expected = step / warmup if step < warmup else max(floor / PEAK, 0.8 ** ((step - warmup) / 25))
        assert found[step] == pytest.approx(expected, rel=1e-12), step
    assert factors("exponential")[25] == pytest.approx(0.9)


@pytest.mark.parametrize("floor", [0.0, 2e-5])
@pytest.mark.parametrize(
    ("kwargs", "height"),
    [
        ({}, lambda step: triangle(step, 25)),
        ({"step_size_up": 1, "mode": "triangular2"}, lambda step: triangle(step, 50) / 2 ** (step // 50)),
        ({"mode": "exp_range", "gamma": 0.5}, lambda step: triangle(step, 25) * 0.5 ** (step / 25)),
    ],
)
def test_cyclic_goes_from_the_floor_to_the_peak_and_back(
    floor: float, kwargs: dict[str, Any], height: Callable[[float], float]
) -> None:
    found = factors("cyclic", floor, **kwargs)
    for step in TEN:
        assert found[step] == pytest.approx(floor / PEAK + (1 - floor / PEAK) * height(step), abs=1e-9), step


def test_cyclic_may_fall_faster_than_it_climbs() -> None:
    found = factors("cyclic", step_size_up=0.8, step_size_down=0.2)
    assert [found[step] for step in (0, 10, 20, 24, 25, 45)] == pytest.approx([0, 0.5, 1, 0.2, 0, 1])


@pytest.mark.parametrize("warmup", [0, 10])
def test_constant_stays(warmup: int) -> None:
    found = factors("constant", 0.0, warmup)
    assert [found[step] for step in TEN] == [min(1.0, step / warmup) if warmup else 1.0 for step in TEN]


def test_one_cycle_ends_on_the_floor_where_there_is_one() -> None:
    assert factors("one_cycle", 1e-6)[99] == pytest.approx(1e-6 / PEAK)
    assert factors("one_cycle")[99] == pytest.approx(1 / 25 / 1e4)
    assert factors("one_cycle")[0] == pytest.approx(1 / 25)
    assert factors("one_cycle", div_factor=10.0, final_div_factor=100.0)[99] == pytest.approx(1e-3)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_one_cycle_bears_a_run_of_a_few_steps(total: int) -> None:
    assert all(0 <= ratio <= 1 for ratio in factors("one_cycle", total=total))


TRANSFORMERS = [
    ("constant", {}, 0.0, 0, "constant", None),
    ("constant", {}, 0.0, 7, "constant_with_warmup", None),
    ("linear_warmup", {}, 0.0, 7, "linear", None),
    ("linear_warmup", {}, 3e-5, 7, "polynomial", {"power": 1.0, "lr_end": 3e-5}),
    ("cosine_annealing", {}, 0.0, 7, "cosine", None),
    ("cosine_annealing", {}, 0.0, 0, "cosine", None),
    ("cosine_annealing", {}, 3e-5, 7, "cosine_with_min_lr", {"min_lr": 3e-5}),
    ("cosine_annealing_warm_restarts", {"num_cycles": 3}, 0.0, 7, "cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_annealing_warm_restarts", {}, 0.0, 0, "cosine_with_restarts", {"num_cycles": 1}),
    ("polynomial", {"power": 1.7}, 0.0, 7, "polynomial", {"power": 1.7, "lr_end": 0.0}),
    ("polynomial", {"power": 0.5}, 3e-5, 7, "polynomial", {"power": 0.5, "lr_end": 3e-5}),
]


@pytest.mark.parametrize(("name", "kwargs", "floor", "warmup", "theirs", "their_kwargs"), TRANSFORMERS)
@pytest.mark.parametrize("total", [100, 313])
def test_rates_are_transformers_own_to_the_last_bit(
    name: str,
    kwargs: dict[str, Any],
    floor: float,
    warmup: int,
    theirs: str,
    their_kwargs: dict[str, Any] | None,
    total: int,
) -> None:
    optimizer, own = an_optimizer(), an_optimizer()
    scheduler = get_scheduler(theirs, optimizer, warmup, total, scheduler_specific_kwargs=their_kwargs)
    factor = factor_of(
        name, peak=PEAK, floor=floor, warmup_steps=warmup, total_steps=total, steps_per_epoch=25, kwargs=kwargs
    )
    expected = rates_of(scheduler, optimizer, total)
    assert rates_of(make_scheduler(own, factor), own, total) == expected


def test_rates_are_torch_s_own_for_one_cycle() -> None:
    for strategy in ("cos", "linear"):
        optimizer = an_optimizer()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK, total_steps=TOTAL, cycle_momentum=False, anneal_strategy=strategy, pct_start=0.25
        )
        expected = rates_of(scheduler, optimizer, TOTAL - 1)
        found = factors("one_cycle", anneal_strategy=strategy, pct_start=0.25)[:TOTAL]
        assert [PEAK * ratio for ratio in found] == pytest.approx(expected, rel=1e-9)


def test_rates_are_torch_s_own_for_cyclic_step_and_multi_step() -> None:
    schedulers = torch.optim.lr_scheduler
    for mode in ("triangular", "triangular2"):
        optimizer = an_optimizer()
        scheduler = schedulers.CyclicLR(optimizer, 2e-5, PEAK, step_size_up=25, mode=mode, cycle_momentum=False)
        found = factors("cyclic", 2e-5, step_size_up=1, mode=mode)
        assert [PEAK * ratio for ratio in found] == pytest.approx(rates_of(scheduler, optimizer, TOTAL), rel=1e-9)
    optimizer = an_optimizer()
    expected = rates_of(schedulers.StepLR(optimizer, EPOCH, 0.1), optimizer, TOTAL)
    assert [PEAK * ratio for ratio in factors("step")] == pytest.approx(expected, rel=1e-9)
    optimizer = an_optimizer()
    expected = rates_of(schedulers.MultiStepLR(optimizer, [50, 75], 0.5), optimizer, TOTAL)
    found = factors("multi_step", milestones=[2, 3], gamma=0.5)
    assert [PEAK * ratio for ratio in found] == pytest.approx(expected, rel=1e-9)


def test_a_function_of_the_user_says_the_ratio() -> None:
    assert factors("lambda", function=lambda step, total: 1 - step / total)[25] == 0.75
    with pytest.raises(StageError, match=r"returned nan for step 0 of 100; it returns the ratio"):
        factors("lambda", function=lambda step, total: math.nan)
    with pytest.raises(StageError, match=r"returned -0.01 for step 1"):
        factors("lambda", function=lambda step, total: -step / total)


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (20, 0.0), (20, 2e-5)])
def test_a_sequence_runs_one_schedule_after_the_other(warmup: int, floor: float) -> None:
    left = TOTAL - warmup
    items = [{"type": "constant", "share": 0.5, "scale": 0.5}, {"type": "linear_warmup"}]
    found = factors("sequential", floor, warmup, schedules=items)
    for step in TEN:
        if step < warmup:
            expected = step / warmup
        elif step < warmup + left / 2:
            expected = 0.5
        else:
            expected = 1 - (1 - floor / PEAK) * (step - warmup - left / 2) / (left / 2)
        assert found[step] == pytest.approx(expected, abs=1e-12), step


def test_a_part_of_a_sequence_has_its_own_arguments_and_its_own_floor() -> None:
    items = [
        {"type": "cosine_annealing", "share": 0.4},
        {"type": "cosine_annealing", "share": 0.6, "scale": 0.2},
    ]
    found = factors("sequential", 2e-5, schedules=items)
    assert [found[step] for step in (0, 20, 40, 70, 100)] == pytest.approx([1, 0.55, 0.2, 0.15, 0.1])


ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("step", {"gama": 0.5}, "kw.gama: unknown argument; did you mean 'gamma'?"),
    ("step", {"milestones": [1]}, "kw.milestones: unknown argument; 'step' takes step_size, gamma"),
    ("step", {"gamma": 1.5}, "kw.gamma: must be a number above 0, at most 1, not 1.5"),
    ("step", {"step_size": True}, "kw.step_size: must be a number above 0, not True"),
    ("constant", {"gamma": 0.5}, "kw.gamma: unknown argument; 'constant' takes none"),
    ("cosine_annealing", {"num_cycles": 2}, "kw.num_cycles: unknown argument; 'cosine_annealing' takes none"),
    ("cosine_annealing_warm_restarts", {"num_cycles": 2}, "kw.num_cycles: is an option of the stage; set num_cycles"),
    ("polynomial", {"power": 2}, "kw.power: is an option of the stage; set scheduler_power there"),
    ("multi_step", {"milestones": [2, 1]}, "kw.milestones: must be a list of epochs above 0, each once, rising"),
    ("multi_step", {"milestones": []}, "kw.milestones: must be a list"),
    ("multi_step", {"milestones": "12"}, "kw.milestones: must be a list"),
    ("one_cycle", {"anneal_strategy": "exp"}, "kw.anneal_strategy: must be one of cos, linear, not 'exp'"),
    ("cyclic", {"mode": "square"}, "kw.mode: must be one of triangular, triangular2, exp_range"),
    ("lambda", {}, "kw.function: missing; 'lambda' needs it"),
    ("lambda", {"function": "f"}, "kw.function: must be a function"),
    ("reduce_on_plateau", {"patience": 1.5}, "kw.patience: must be a whole number of at least 0"),
    ("sequential", {}, "kw.schedules: missing"),
    ("sequential", {"schedules": []}, "kw.schedules: must be a list of schedules"),
    ("sequential", {"schedules": [{"share": 1}]}, "kw.schedules.0.type: missing"),
    ("sequential", {"schedules": [{"type": ["step"]}]}, "kw.schedules.0.type: \"['step']\" is no schedule"),
    ("sequential", {"schedules": [{"type": "cosin_annealing"}]}, "did you mean 'cosine_annealing'?"),
    ("sequential", {"schedules": [{"type": "sequential"}]}, "kw.schedules.0.type: 'sequential' cannot be part"),
    ("sequential", {"schedules": [{"type": "step", "gama": 1}]}, "kw.schedules.0.gama: unknown argument"),
    ("sequential", {"schedules": [{"type": "step", "scale": 0}]}, "kw.schedules.0.scale: must be a number above 0"),
    (
        "sequential",
        {"schedules": [{"type": "constant"}, {"type": "constant"}]},
        "kw.schedules.0.share: missing; only the last schedule may leave it out",
    ),
    (
        "sequential",
        {"schedules": [{"type": "constant", "share": 0.5}, {"type": "constant", "share": 0.4}]},
        "kw.schedules: the shares add up to 0.9; they must add up to 1",
    ),
    (
        "sequential",
        {"schedules": [{"type": "constant", "share": 1}, {"type": "constant"}]},
        "kw.schedules: the shares add up to 1; they must leave something to the last schedule",
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), ARGUMENTS)
def test_a_wrong_argument_is_told_with_its_path(name: str, kwargs: dict[str, Any], message: str) -> None:
    problems = problems_of_schedule(name, kwargs, peak=PEAK, where="kw")
    assert len(problems) == 1
    assert message in str(problems[0])


@pytest.mark.parametrize("name", KINDS)
def test_t28_a_floor_or_a_warmup_without_effect_is_told(name: str) -> None:
    needed: dict[str, Any] = {
        "lambda": {"function": "a:b"},
        "sequential": {"schedules": [{"type": "constant"}]},
    }.get(name, {})
    plain = problems_of_schedule(name, needed, peak=PEAK)
    floor = problems_of_schedule(name, needed, peak=PEAK, floor=1e-5)
    warmup = problems_of_schedule(name, needed, peak=PEAK, warmup_set="warmup_ratio")
    assert plain == []
    assert [one.path for one in floor] == (["min_learning_rate"] if name in {"constant", "lambda"} else [])
    without = {"one_cycle", "cyclic", "lambda", "reduce_on_plateau"}
    assert [one.path for one in warmup] == (["warmup_ratio"] if name in without else [])


def test_a_floor_above_the_peak_is_told_also_in_a_sequence() -> None:
    (problem,) = problems_of_schedule("cosine_annealing", {}, peak=1e-4, floor=1e-4)
    assert str(problem) == "min_learning_rate: 0.0001 is not below the learning rate (0.0001)"
    items = [{"type": "step", "scale": 0.1}]
    (problem,) = problems_of_schedule("sequential", {"schedules": items}, peak=1e-4, floor=5e-5)
    assert problem.path == "min_learning_rate"
    (problem,) = problems_of_schedule("one_cycle", {"final_div_factor": 10.0}, peak=1e-4, floor=5e-5)
    assert problem.path == "scheduler_kwargs.final_div_factor"


def test_a_factor_is_not_made_of_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="gama: unknown argument"):
        factors("step", gama=0.1)
    with pytest.raises(ConfigError, match="follows the metric"):
        factors("reduce_on_plateau")
    with pytest.raises(ConfigError, match="'cosine_anealing' is no schedule; did you mean"):
        factors("cosine_anealing")


def test_t29_plateau_arguments_say_the_direction_of_the_metric() -> None:
    assert plateau_kwargs({}, maximize=False, floor=1e-6) == {
        "mode": "min",
        "factor": 0.1,
        "patience": 10,
        "threshold": 1e-4,
        "cooldown": 0,
        "min_lr": 1e-6,
    }
    kwargs = plateau_kwargs({"patience": 0, "factor": 0.5}, maximize=True, floor=0.0)
    optimizer = an_optimizer()
    scheduler = get_scheduler("reduce_lr_on_plateau", optimizer, scheduler_specific_kwargs=kwargs)
    rates = []
    for accuracy in (0.5, 0.6, 0.7, 0.6, 0.8):
        scheduler.step(accuracy)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [PEAK, PEAK, PEAK, PEAK / 2, PEAK / 2]


def test_a_scheduler_goes_on_where_its_state_was_saved() -> None:
    arguments: dict[str, Any] = {"peak": PEAK, "floor": 0.0, "warmup_steps": 5, "total_steps": 50}
    for name in sorted(set(KINDS) - {"reduce_on_plateau", "lambda", "sequential"}):
        factor = factor_of(name, steps_per_epoch=10, kwargs={}, **arguments)
        optimizer = an_optimizer()
        scheduler = make_scheduler(optimizer, factor)
        rates = rates_of(scheduler, optimizer, 50)
        again = an_optimizer()
        resumed = make_scheduler(again, factor)
        before = rates_of(resumed, again, 19)
        states = resumed.state_dict(), again.state_dict()
        last = an_optimizer()
        scheduler = make_scheduler(last, factor)
        last.load_state_dict(states[1])
        scheduler.load_state_dict(states[0])
        assert before + rates_of(scheduler, last, 30) == rates, name


class Scheduled(SFTTrainer):  # type: ignore[misc]
    """What the mixin does with a schedule of ours."""

    schedule: Any = None

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        found = super().set_initial_training_values(*args, **kwargs)
        self.steps_per_epoch = found[1]
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            factor = self.schedule(warmup, num_training_steps, self.steps_per_epoch)
            self.lr_scheduler = make_scheduler(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler


def test_a_trainer_drops_the_rate_at_the_end_of_each_epoch_also_after_a_resume(
    sft_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    """16 rows in batches of 3, two a step: 6 batches and 3 steps an epoch; the logged rate is that of the step."""

    def trainer(folder: str) -> Any:
        args = SFTConfig(
            output_dir=str(tmp_path / folder),
            num_train_epochs=3,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            warmup_steps=2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=4,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            activation_checkpointing=False,
        )
        made = Scheduled(
            model=tiny_model_path,
            args=args,
            train_dataset=Dataset.from_list(sft_rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        )
        made.schedule = lambda warmup, total, epoch: factor_of(
            "step",
            peak=1e-3,
            floor=2e-5,
            warmup_steps=warmup,
            total_steps=total,
            steps_per_epoch=epoch,
            kwargs={},
        )
        return made

    def logged(trainer: Any) -> list[float]:
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    whole = trainer("whole")
    whole.train()
    assert logged(whole) == pytest.approx([0, 5e-4, 1e-3, 1e-4, 1e-4, 1e-4, 2e-5, 2e-5, 2e-5])
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert logged(resumed) == logged(whole)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
