"""Which metrics a stage measures, by name: those of its trainer, and those of the texts that its policy writes."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from stagekit.errors import Problem
from stagekit.options import nearest


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


TEXT_METRICS = ("f1_score", "bleu", "rouge", "reward_score", "win_rate")
"""Metrics of the answers that a policy writes to the prompts of the validation data. More is better for each."""

_LIBRARIES: Mapping[str, tuple[str, str]] = {
    "bleu": ("sacrebleu", "sacrebleu"),
    "rouge": ("rouge_score", "rouge-score"),
}
"""Metric -> module and package that compute it."""


def answers(stage: "TrainingStage") -> bool:
    """Whether the stage's policy can be asked for answers, so that there are texts to measure."""
    return "text_metrics" in stage.method.slots


def is_likelihood(stage: "TrainingStage") -> bool:
    """Whether the evaluation loss is a mean negative log-likelihood, so that its exponential means something."""
    return stage.method.perplexity and stage.custom_loss_function is None


def text_metrics_of(stage: "TrainingStage") -> tuple[str, ...]:
    """The text metrics that the stage measures at every evaluation: those that one of its options names."""
    if not answers(stage) or stage.validation_data is None:
        return ()
    asked = {name for _, name in _asked(stage)}
    return tuple(name for name in TEXT_METRICS if name in asked)


def metric_key(stage: "TrainingStage", name: str) -> str:
    """The key under which the trainer reports a metric that an option names."""
    return stage.method.metric_keys.get(name) or f"eval_{name}"


def problems_of_measures(stage: "TrainingStage") -> Iterable[Problem]:
    """Metrics that nothing measures, and text metrics without what they need; paths relative to the stage."""
    yield from _unknown(stage)
    if not answers(stage):
        return
    asked = [(path, name) for path, name in _asked(stage) if name in TEXT_METRICS]
    if asked and stage.validation_data is not None:
        yield from _never(stage, asked)
        yield from _turned_around(stage, asked)
        yield from _judged(stage, {name for _, name in asked})
    elif stage.text_metrics is not None:
        known = ", ".join(TEXT_METRICS)
        without = f"none of {known} is in metrics_to_track" if not asked else "there is no validation_data"
        yield Problem("text_metrics", f"has no effect: {without}")


def problems_of_libraries(stage: "TrainingStage") -> Iterable[Problem]:
    """Text metrics whose library is not installed here."""
    for path, name in _asked(stage):
        module, package = _LIBRARIES.get(name, ("", ""))
        if module and name in text_metrics_of(stage) and importlib.util.find_spec(module) is None:
            message = f'{name!r} needs {package}, which is not installed; run pip install "trl-stagekit[metrics]"'
            yield Problem(f"{stage.path}.{path}", message)


def _trains(stage: "TrainingStage") -> bool:
    return stage.method.trains and not stage.is_evaluation_only


def _asked(stage: "TrainingStage") -> Iterator[tuple[str, str]]:
    """Path and name of every metric that the user named, but for `custom_metric_name`."""
    if "metrics_to_track" in stage.model_fields_set:
        yield from (("metrics_to_track", name) for name in stage.metrics_to_track)
    if _trains(stage) and stage.save_only_best:
        yield "best_checkpoint_metric", stage.best_checkpoint_metric
    if _trains(stage) and stage.early_stopping is not None:
        yield "early_stopping.metric", stage.early_stopping.metric.removeprefix("eval_")
    if stage.gate is not None:
        yield "gate.metric", stage.gate.metric.removeprefix("eval_")


def _unknown(stage: "TrainingStage") -> Iterable[Problem]:
    """A metric to stop by, or to track, that no evaluation will have; a function of the user's may return any."""
    if stage.custom_evaluation_function is not None:
        return
    tracked = {"loss", "perplexity", "accuracy", *(TEXT_METRICS if answers(stage) else ())}
    reported = {name for name, key in stage.method.metric_keys.items() if key} | set(stage.method.reports)
    reported |= {key.removeprefix("eval_") for key in stage.method.metric_keys.values() if key}
    reported |= {"perplexity"} if is_likelihood(stage) else set()
    known = {"metrics_to_track": tracked, "early_stopping.metric": reported | (tracked & set(TEXT_METRICS))}
    for path, name in _asked(stage) if stage.validation_data is not None else ():
        if path in known and name not in known[path]:
            close = nearest(name, known[path])
            have = f"did you mean {close!r}?" if close else f"it has {', '.join(sorted(known[path]))}"
            message = f"{name!r} is no metric of {stage.method.type!r}; {have}"
            yield Problem(path, f"{message} (others come from custom_evaluation_function)")


def _never(stage: "TrainingStage", asked: list[tuple[str, str]]) -> Iterable[Problem]:
    if _trains(stage) and stage.evaluation_steps == 0:
        for path, name in asked:
            if path in {"metrics_to_track", "gate.metric"}:
                yield Problem(path, f"{name!r} is never measured with evaluation_steps: 0")


def _turned_around(stage: "TrainingStage", asked: list[tuple[str, str]]) -> Iterable[Problem]:
    """The switches of direction are off by default, which would keep the worst."""
    early = stage.early_stopping
    switches = {
        "best_checkpoint_metric": ("best_checkpoint_metric_maximize", stage.best_checkpoint_metric_maximize),
        "early_stopping.metric": ("early_stopping.maximize", early is not None and early.maximize),
    }
    for path, name in asked:
        option, maximize = switches.get(path, ("", True))
        if not maximize:
            yield Problem(option, f"must be true with {path}: {name}, of which more is better")


def _judged(stage: "TrainingStage", names: set[str]) -> Iterable[Problem]:
    """A reward or a win rate needs somebody who judges; who judges needs something to judge."""
    group = stage.text_metrics
    scorer, judge = (None, None) if group is None else (group.reward_model, group.judge)
    if "reward_score" in names and scorer is None:
        ways = "stage:NAME of a reward stage, a folder, a hub id, or a function"
        yield Problem("text_metrics.reward_model", f"missing; reward_score needs one: {ways}")
    if "win_rate" in names and scorer is None and judge is None:
        ways = "a function, or a reward model as text_metrics.reward_model, whose higher score wins"
        yield Problem("text_metrics.judge", f"missing; win_rate needs one: {ways}")
    if judge is not None and "win_rate" not in names:
        yield Problem("text_metrics.judge", "has no effect: win_rate is not asked for")
    if scorer is not None and "reward_score" not in names and ("win_rate" not in names or judge is not None):
        why = "text_metrics.judge decides on win_rate" if "win_rate" in names else "nor is win_rate"
        yield Problem("text_metrics.reward_model", f"has no effect: reward_score is not asked for, and {why}")
