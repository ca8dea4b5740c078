"""Learning rate schedules: pure functions from the step to the ratio of the rate to its peak.

One schedule, one function `curve(step, run, **its own arguments) -> ratio`; `factor_of` binds one to a run. For all:

- `step` counts optimiser steps from 0; step 0 is the rate of the first update.
- The rate climbs linearly from 0 to its peak over the warm-up, and the curve starts where the warm-up ends. `step` and
  `multi_step` count from the start of training, since their arguments name epochs; the climb is multiplied in.
- The floor is an absolute rate. Curves that end are stretched so that they end on it; the others stop falling there.
- No warm-up for `one_cycle` and `cyclic`, which climb by themselves, and for `lambda`, which says everything itself.
- No floor for `constant` and `lambda`.

Where transformers has the schedule (constant, linear, cosine, cosine with restarts, polynomial, cosine with a floor),
the ratio is the same to the last bit. Epochs may be fractions; the trainer's steps per epoch turn them into steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from stagekit.errors import ConfigError, Problem, StageError
from stagekit.options import nearest, shown


Factor = Callable[[int], float]
"""Step -> ratio of the learning rate to its peak."""


@dataclass(frozen=True)
class Run:
    """What a curve needs to know of the training: rates as numbers, lengths in optimiser steps."""

    peak: float
    floor: float
    warmup_steps: int
    total_steps: int
    steps_per_epoch: float

    @property
    def floor_ratio(self) -> float:
        """The floor as a ratio to the peak."""
        return self.floor / self.peak

    def progress(self, step: int) -> float:
        """Share of the steps after the warm-up that is done at `step`."""
        return (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)

    def above_floor(self, shape: float) -> float:
        """A shape between 0 and 1, stretched to end on the floor."""
        return shape * (1 - self.floor_ratio) + self.floor_ratio


def factor_of(
    name: str,
    *,
    peak: float,
    floor: float,
    warmup_steps: int,
    total_steps: int,
    steps_per_epoch: float,
    kwargs: Mapping[str, Any],
) -> Factor:
    """The schedule `name` of one training, as a function of the step.

    Args:
        peak: The learning rate that the ratio is of.
        floor: The rate where the decay ends; 0 for the kinds without a floor.
        warmup_steps: Steps of linear climb; 0 for the kinds without a warm-up.
        kwargs: The schedule's own arguments, with `num_cycles` and `power` of the stage among them. The function of
            `lambda` is the callable itself.

    Raises:
        ConfigError: an argument that the schedule does not have, or of the wrong kind.
    """
    problems = _problems(name, kwargs, peak, floor, "", nested=True)
    if name == "reduce_on_plateau" and not problems:
        problems.append(Problem("", "'reduce_on_plateau' follows the metric, not the step; see plateau_kwargs"))
    if problems:
        raise ConfigError(problems)
    run = Run(peak, floor, warmup_steps, total_steps, steps_per_epoch)
    kind = KINDS[name]
    return partial(_warmed, curve=partial(kind.curve, **kwargs), run=run, whole=kind.from_start)


def make_scheduler(optimizer: Any, factor: Factor) -> Any:
    """The torch scheduler that multiplies every group's rate by `factor`; its state is the step alone."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, factor)


def plateau_kwargs(kwargs: Mapping[str, Any], *, maximize: bool, floor: float) -> dict[str, Any]:
    """The `lr_scheduler_kwargs` of transformers' `reduce_lr_on_plateau`, all of them said.

    The rate is multiplied by `factor` once the metric has not improved by `threshold` (relative to its best) for more
    than `patience` evaluations. The metric is `metric_for_best_model`.

    Args:
        kwargs: `factor` (0.1), `patience` in evaluations (10), `threshold` (1e-4), `cooldown` in evaluations (0).
        maximize: Whether a higher metric is better.
        floor: The lowest rate.
    """
    given = {"factor": 0.1, "patience": 10, "threshold": 1e-4, "cooldown": 0, **kwargs}
    return {"mode": "max" if maximize else "min", "min_lr": floor, **given}


def _warmed(step: int, *, curve: Callable[[int, Run], float], run: Run, whole: bool) -> float:
    """The climb, then the curve; `whole` curves run during the climb too."""
    if step < run.warmup_steps:
        climb = step / run.warmup_steps
        return climb * curve(step, run) if whole else climb
    return curve(step, run)


def constant(step: int, run: Run) -> float:
    """The peak, to the end."""
    return 1.0


def cosine_annealing(step: int, run: Run) -> float:
    """Half a cosine wave from the peak to the floor. Source: huggingface.co/papers/1608.03983, one period."""
    return max(0.0, run.above_floor(0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * run.progress(step)))))


def cosine_annealing_warm_restarts(step: int, run: Run, num_cycles: int = 1) -> float:
    """`num_cycles` such half waves of equal length, each from the peak. Source: huggingface.co/papers/1608.03983."""
    progress = run.progress(step)
    if progress >= 1.0:
        return run.above_floor(0.0)
    return max(0.0, run.above_floor(0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0)))))


def polynomial(step: int, run: Run, power: float = 1.0) -> float:
    """From the peak to the floor as the remaining share of the steps to the `power`."""
    if step > run.total_steps:
        return run.floor_ratio
    remaining = 1 - (step - run.warmup_steps) / max(1, run.total_steps - run.warmup_steps)
    return float(((run.peak - run.floor) * remaining**power + run.floor) / run.peak)


def linear_warmup(step: int, run: Run) -> float:
    """A straight line from the peak to the floor."""
    if run.floor > 0:
        return polynomial(step, run)
    return max(0.0, (run.total_steps - step) / max(1, run.total_steps - run.warmup_steps))


def step_decay(step: int, run: Run, step_size: float = 1, gamma: float = 0.1) -> float:
    """Times `gamma` every `step_size` epochs."""
    return max(run.floor_ratio, float(gamma ** _passed(step, step_size * run.steps_per_epoch)))


def multi_step(step: int, run: Run, milestones: Sequence[float] | None = None, gamma: float = 0.1) -> float:
    """Times `gamma` after each of the `milestones`, in epochs; None = at half and at three quarters of all steps."""
    if milestones is None:
        ends = [0.5 * run.total_steps, 0.75 * run.total_steps]
    else:
        ends = [milestone * run.steps_per_epoch for milestone in milestones]
    return max(run.floor_ratio, gamma ** sum(_passed(step, end) >= 1 for end in ends))


def exponential(step: int, run: Run, gamma: float = 0.9) -> float:
    """Times `gamma` per epoch, a little at every step."""
    return max(run.floor_ratio, float(gamma ** ((step - run.warmup_steps) / run.steps_per_epoch)))


def one_cycle(
    step: int,
    run: Run,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float | None = None,
    anneal_strategy: str = "cos",
) -> float:
    """Up from peak / `div_factor` over the share `pct_start` of the steps, then down: to the floor or, where that is
    0, to the start / `final_div_factor` (1e4). `anneal_strategy`: cos or linear.
    Source: huggingface.co/papers/1708.07120.
    """
    top, end = float(pct_start * run.total_steps) - 1, run.total_steps - 1
    first = 1 / div_factor
    last = run.floor_ratio if run.floor > 0 else first / (1e4 if final_div_factor is None else final_div_factor)
    if step < top:
        return _anneal(first, 1.0, step / top, anneal_strategy)
    return _anneal(1.0, last, min(1.0, (step - top) / (end - top)) if end > top else 1.0, anneal_strategy)


def cyclic(
    step: int,
    run: Run,
    step_size_up: float = 0.5,
    step_size_down: float | None = None,
    mode: str = "triangular",
    gamma: float = 0.9,
) -> float:
    """From the floor to the peak and back in straight lines, again and again: up over `step_size_up` epochs, down over
    `step_size_down` (None = as many). `mode`: `triangular`; `triangular2` halves the height every cycle; `exp_range`
    multiplies it by `gamma` per epoch. Source: huggingface.co/papers/1506.01186.
    """
    up = step_size_up * run.steps_per_epoch
    length = up + (step_size_up if step_size_down is None else step_size_down) * run.steps_per_epoch
    cycle = _passed(step, length)
    within = step - cycle * length
    height = within / up if within <= up else (length - within) / (length - up)
    if mode == "triangular2":
        height /= 2.0**cycle
    elif mode == "exp_range":
        height *= gamma ** (step / run.steps_per_epoch)
    return run.above_floor(max(0.0, height))


def own_function(step: int, run: Run, function: Callable[[int, int], float]) -> float:
    """`function(step, total_steps)`, which returns the ratio to the peak.

    Raises:
        StageError: it returned no number, or one below 0.
    """
    found = function(step, run.total_steps)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        raise StageError(
            f"scheduler_type 'lambda': the function returned {shown(found)} for step {step} of {run.total_steps}; it "
            "returns the ratio of the learning rate to its peak, a number of 0 or more"
        )
    return float(found)


def sequential(step: int, run: Run, schedules: Sequence[Mapping[str, Any]]) -> float:
    """One schedule after the other. Each item has a `type`, the `share` of the steps that it lasts (the last item may
    leave it out: the rest), a `scale` that its peak is multiplied by (1), and its own arguments; it counts its own
    steps from 0, and epochs from its own start.
    """
    start, left = run.warmup_steps, run.total_steps - run.warmup_steps
    done = 0.0
    for position, item in enumerate(schedules):
        last = position == len(schedules) - 1
        done += 0.0 if last else item["share"]
        stop = run.total_steps if last else run.warmup_steps + round(done * left)
        if step < stop or last:
            scale = item.get("scale", 1.0)
            part = Run(run.peak * scale, run.floor, 0, stop - start, run.steps_per_epoch)
            own = {key: value for key, value in item.items() if key not in {"type", "share", "scale"}}
            return float(scale * KINDS[item["type"]].curve(step - start, part, **own))
        start = stop
    raise AssertionError("problems_of_schedule lets no empty sequence through")


def _passed(step: int, length: float) -> int:
    """How often `length` steps have gone by; the end of an epoch counts although its number of steps is rounded."""
    return math.floor(step / length + 1e-9)


def _anneal(start: float, end: float, share: float, strategy: str) -> float:
    if strategy == "linear":
        return (end - start) * share + start
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


class Rule(NamedTuple):
    """What an argument must be, for machines and for people."""

    holds: Callable[[Any], bool]
    text: str


def _number(value: Any, low: float, high: float = math.inf) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and low < value < high


def _rising(value: Any) -> bool:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    return bool(items) and all(_number(item, 0) for item in items) and items == sorted(set(items))


_ABOVE_0 = Rule(lambda value: _number(value, 0), "must be a number above 0")
_SHARE = Rule(lambda value: _number(value, 0, 1), "must be a number between 0 and 1")
_GAMMA = Rule(lambda value: _number(value, 0) and value <= 1, "must be a number above 0, at most 1")
_ONE_OR_MORE = Rule(lambda value: _number(value, 0) and isinstance(value, int), "must be a whole number of at least 1")
_ZERO_OR_MORE = Rule(
    lambda value: _number(value, -1) and isinstance(value, int), "must be a whole number of at least 0"
)
_EPOCHS = Rule(lambda value: value is None or _rising(value), "must be a list of epochs above 0, each once, rising")
_MAYBE = Rule(lambda value: value is None or _number(value, 0), "must be a number above 0")


def _one_of(*words: str) -> Rule:
    return Rule(lambda value: value in words, f"must be one of {', '.join(words)}")


_FUNCTION = Rule(
    lambda value: callable(value) or (isinstance(value, str) and value.count(":") == 1),
    "must be a function, or the name of one as package.module:function",
)
_ITEMS = Rule(
    lambda value: isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value),
    "must be a list of schedules, each a mapping with type, share and its own arguments",
)


class Kind(NamedTuple):
    """One schedule: its curve, its arguments, and what it has no use for (with the reason)."""

    curve: Callable[..., float]
    rules: Mapping[str, Rule] = {}
    no_warmup: str = ""
    no_floor: str = ""
    needed: str = ""
    """The argument that has no default."""
    from_start: bool = False
    """Whether it counts from the start of training instead of from the end of the warm-up."""


_CLIMBS = "which climbs by itself"
_SAYS_ALL = "whose function says the whole ratio"

KINDS: Mapping[str, Kind] = {
    "constant": Kind(constant, no_floor="which does not decay"),
    "cosine_annealing": Kind(cosine_annealing),
    "cosine_annealing_warm_restarts": Kind(cosine_annealing_warm_restarts, {"num_cycles": _ONE_OR_MORE}),
    "polynomial": Kind(polynomial, {"power": _ABOVE_0}),
    "linear_warmup": Kind(linear_warmup),
    "reduce_on_plateau": Kind(
        constant,  # never called: factor_of refuses it
        {"factor": _SHARE, "patience": _ZERO_OR_MORE, "threshold": _ABOVE_0, "cooldown": _ZERO_OR_MORE},
        no_warmup="which follows the metric of the evaluations alone",
    ),
    "step": Kind(step_decay, {"step_size": _ABOVE_0, "gamma": _GAMMA}, from_start=True),
    "multi_step": Kind(multi_step, {"milestones": _EPOCHS, "gamma": _GAMMA}, from_start=True),
    "exponential": Kind(exponential, {"gamma": _GAMMA}),
    "one_cycle": Kind(
        one_cycle,
        {
            "pct_start": _SHARE,
            "div_factor": Rule(lambda value: _number(value, 1), "must be a number above 1"),
            "final_div_factor": _MAYBE,
            "anneal_strategy": _one_of("cos", "linear"),
        },
        no_warmup=f"{_CLIMBS}; use its pct_start",
    ),
    "cyclic": Kind(
        cyclic,
        {
            "step_size_up": _ABOVE_0,
            "step_size_down": _MAYBE,
            "mode": _one_of("triangular", "triangular2", "exp_range"),
            "gamma": _GAMMA,
        },
        no_warmup=f"{_CLIMBS}; use its step_size_up",
    ),
    "lambda": Kind(own_function, {"function": _FUNCTION}, _SAYS_ALL, _SAYS_ALL, needed="function"),
    "sequential": Kind(sequential, {"schedules": _ITEMS}, needed="schedules"),
}
"""Every schedule by its name in `scheduler_type`."""

STAGE_OPTIONS = {"num_cycles": "num_cycles", "power": "scheduler_power"}
"""Arguments that are options of the stage -> their names there."""


def problems_of_schedule(
    name: str,
    kwargs: Mapping[str, Any],
    *,
    peak: float,
    floor: float = 0.0,
    warmup_set: str | None = None,
    where: str = "scheduler_kwargs",
) -> list[Problem]:
    """What cannot work in a declared schedule; paths relative to the stage.

    Args:
        kwargs: The mapping that the user wrote, without the stage's own options.
        floor: `min_learning_rate`.
        warmup_set: The warm-up option that the user set above 0 (`warmup_steps`, `warmup_ratio`); None: none.
        where: The option that holds `kwargs`.
    """
    problems = _problems(name, kwargs, peak, floor, where, nested=False)
    if name in KINDS and warmup_set is not None and KINDS[name].no_warmup:
        problems.append(Problem(warmup_set, f"has no effect on {name!r}, {KINDS[name].no_warmup}"))
    return problems


def _problems(
    name: str, kwargs: Mapping[str, Any], peak: float, floor: float, where: str, nested: bool
) -> list[Problem]:
    if name not in KINDS:
        return [Problem("scheduler_type", _no_schedule(name))]
    kind, found = KINDS[name], []
    for key, value in kwargs.items():
        if not nested and key in STAGE_OPTIONS and key in kind.rules:
            found.append(Problem(_path(where, key), f"is an option of the stage; set {STAGE_OPTIONS[key]} there"))
        elif key not in kind.rules:
            found.append(Problem(_path(where, key), _unknown(name, key, kind)))
        elif not kind.rules[key].holds(value):
            found.append(Problem(_path(where, key), f"{kind.rules[key].text}, not {shown(value)}"))
    if kind.needed and kind.needed not in kwargs:
        found.append(Problem(_path(where, kind.needed), f"missing; {name!r} needs it: {kind.rules[kind.needed].text}"))
    if floor > 0 and kind.no_floor:
        found.append(Problem("min_learning_rate", f"has no effect on {name!r}, {kind.no_floor}"))
    elif floor >= peak:
        found.append(Problem("min_learning_rate", f"{floor} is not below the learning rate ({peak})"))
    if name == "one_cycle" and floor > 0 and kwargs.get("final_div_factor") is not None:
        found.append(Problem(_path(where, "final_div_factor"), "min_learning_rate is set as well; keep one of them"))
    if name == "sequential" and not found:
        found += _problems_of_items(kwargs["schedules"], peak, floor, _path(where, "schedules"))
    return found


def _no_schedule(name: str) -> str:
    close = nearest(name, KINDS)
    return f"{name!r} is no schedule; " + (f"did you mean {close!r}?" if close else f"there are {', '.join(KINDS)}")


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _unknown(name: str, key: str, kind: Kind) -> str:
    if not kind.rules:
        return f"unknown argument; {name!r} takes none"
    close = nearest(str(key), kind.rules)
    hint = f"did you mean {close!r}?" if close else f"{name!r} takes {', '.join(kind.rules)}"
    return f"unknown argument; {hint}"


def _problems_of_items(items: Sequence[Mapping[str, Any]], peak: float, floor: float, where: str) -> list[Problem]:
    found, shares = [], 0.0
    for position, item in enumerate(items):
        path, kind = f"{where}.{position}", item.get("type")
        own = {key: value for key, value in item.items() if key not in {"type", "share", "scale"}}
        share, scale = item.get("share"), item.get("scale", 1.0)
        if not isinstance(kind, str) or kind not in KINDS:
            found.append(Problem(f"{path}.type", "missing" if kind is None else _no_schedule(str(kind))))
        elif kind in {"sequential", "reduce_on_plateau"}:
            found.append(Problem(f"{path}.type", f"{kind!r} cannot be part of a sequence"))
        elif not _number(scale, 0):
            found.append(Problem(f"{path}.scale", f"{_ABOVE_0.text}, not {shown(scale)}"))
        else:
            found += _problems(kind, own, peak * scale, 0.0 if KINDS[kind].no_floor else floor, path, nested=True)
        if share is None and position < len(items) - 1:
            found.append(Problem(f"{path}.share", "missing; only the last schedule may leave it out"))
        elif share is not None and not (_number(share, 0) and share <= 1):
            found.append(Problem(f"{path}.share", f"must be a number above 0, at most 1, not {shown(share)}"))
        else:
            shares += share or 0.0
    ends_open = items[-1].get("share") is None
    if not found and (shares >= 1 if ends_open else not math.isclose(shares, 1, abs_tol=1e-6)):
        need = "must leave something to the last schedule" if ends_open else "must add up to 1"
        found.append(Problem(where, f"the shares add up to {shares:g}; they {need}"))
    return found
