"""What must hold between stages, and on disk, before anything is loaded. Imports no torch; a second at most."""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagekit.arguments import RESERVED
from stagekit.errors import Problem
from stagekit.groups import Data
from stagekit.options import nearest
from stagekit.sources import parse_data, parse_model, problems_of_data, problems_of_model
from stagekit.trl_fields import fields_of


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline
    from stagekit.stage import TrainingStage


def slug(name: str) -> str:
    """A stage's name as a folder name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.").lower()


def problems_across(pipeline: "TrainingPipeline") -> list[Problem]:
    """Names and references between stages; arguments that TRL does not have."""
    problems = []
    if not pipeline.stages:
        problems.append(Problem("stages", "empty; a pipeline has at least one stage"))
    elif pipeline.model is None and pipeline.stages[0].model is None and _wants_model(pipeline.stages[0]):
        problems.append(Problem("model", "missing; say which model the first stage starts from"))
    seen: dict[str, TrainingStage] = {}
    folders: dict[str, str] = {}
    for stage in pipeline.stages:
        folder = slug(stage.name)
        if stage.name in seen:
            problems.append(
                Problem(f"{stage.path}.name", f"{stage.name!r} is taken by another stage; names are unique")
            )
        elif not folder or "." in stage.name:
            problems.append(
                Problem(
                    f"{stage.path}.name",
                    f"{stage.name!r} cannot name a folder and a path; use letters, digits, - and _",
                )
            )
        elif folder in folders:
            problems.append(
                Problem(f"{stage.path}.name", f"{stage.name!r} has the same folder as {folders[folder]!r}")
            )
        problems += _references(stage, seen, pipeline)
        problems += _arguments(stage)
        seen[stage.name] = stage
        folders[folder] = stage.name
    return problems


def _wants_model(stage: "TrainingStage") -> bool:
    return stage.method.type != "custom"


def models_of(stage: "TrainingStage") -> Iterator[tuple[str, Any]]:
    """Path and value of every model that the stage names."""
    if stage.model is not None:
        yield f"{stage.path}.model", stage.model
    for option in ("critique_model", "teacher"):
        value = getattr(stage.method, option, None)
        if value is not None:
            yield f"{stage.path}.method.{option}", value


def data_of(stage: "TrainingStage") -> Iterator[tuple[str, Any]]:
    """Path and value of every set of data that the stage names; `Data` objects and dicts as they are."""
    for option in ("training_data", "validation_data"):
        value = getattr(stage, option)
        if value is None:
            continue
        if isinstance(value, Mapping) and "source" not in value:
            for name, item in value.items():
                yield f"{stage.path}.{option}.{name}", item
        else:
            yield f"{stage.path}.{option}", value


def as_data(value: Any) -> Data:
    """Any spelling of a data set as a `Data` object."""
    if isinstance(value, Data):
        return value
    return Data(**value) if isinstance(value, Mapping) else Data(value)


def _references(
    stage: "TrainingStage", seen: Mapping[str, "TrainingStage"], pipeline: "TrainingPipeline"
) -> Iterable[Problem]:
    for path, value in models_of(stage):
        if isinstance(value, str) and value.startswith("stage:"):
            yield from _earlier(path, value.removeprefix("stage:"), seen, pipeline)
    for path, value in data_of(stage):
        source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", value)
        if not isinstance(source, str) or not source.startswith("stage:"):
            continue
        name, slash, dataset = source.removeprefix("stage:").partition("/")
        found = list(_earlier(path, name, seen, pipeline))
        yield from found
        if found or seen[name].method.type == "custom":
            continue
        makes = seen[name].method.makes
        if not slash or dataset not in makes:
            have = ", ".join(makes) or "none"
            yield Problem(
                path, f"stage {name!r} leaves no dataset {dataset!r}; it leaves: {have} (write stage:{name}/DATASET)"
            )


def _earlier(
    path: str, name: str, seen: Mapping[str, "TrainingStage"], pipeline: "TrainingPipeline"
) -> Iterable[Problem]:
    if name in seen:
        return
    if any(stage.name == name for stage in pipeline.stages):
        yield Problem(path, f"stage {name!r} comes later; only results of earlier stages can be used")
    else:
        close = nearest(name, seen)
        yield Problem(path, f"no stage {name!r}" + (f"; did you mean {close!r}?" if close else " before this one"))


def _arguments(stage: "TrainingStage") -> Iterable[Problem]:
    if not stage.trl or stage.method.config_class is None:
        return
    fields = fields_of(stage.method.config_class)
    for key in stage.trl:
        if key in RESERVED:
            yield Problem(f"{stage.path}.trl.{key}", f"belongs to {RESERVED[key]}")
        elif key not in fields:
            close = nearest(key, fields)
            hint = f"; did you mean {close!r}?" if close else ""
            config = stage.method.config_class.partition(":")[2]
            yield Problem(f"{stage.path}.trl.{key}", f"{config} has no such argument{hint}")


def problems_on_disk(pipeline: "TrainingPipeline") -> list[Problem]:
    """Models, data and functions that are not where the pipeline says."""
    problems = []
    if isinstance(pipeline.model, str):
        problems += problems_of_model(parse_model(pipeline.model), "model")
    template = pipeline.chat_template
    if template is not None and "{" not in template and not Path(template).is_file():
        problems.append(Problem("chat_template", f"no file {template!r}; give a file or the template itself"))
    for stage in pipeline.stages:
        if not stage.enabled:
            continue
        for path, value in models_of(stage):
            if isinstance(value, str) and not value.startswith("stage:"):
                problems += problems_of_model(parse_model(value), path)
        for path, value in data_of(stage):
            problems += _data(path, value, stage)
        problems += _functions(stage)
    return problems


def _data(path: str, value: Any, stage: "TrainingStage") -> list[Problem]:
    data = as_data(value)
    if not isinstance(data.source, str) or data.source.startswith("stage:"):
        return []
    source = parse_data(data.source)
    if source.kind == "hub" and data.split is None:
        return [
            Problem(
                path, f"{data.source!r} is a hub dataset; say which split: {{source: {data.source}, split: train}}"
            )
        ]
    if data.columns or stage.data_preprocessor is not None:
        return problems_of_data(source, path)
    return problems_of_data(source, path, stage.method.columns)


def _functions(stage: "TrainingStage") -> Iterable[Problem]:
    named = {
        option: getattr(stage, option)
        for option in ("run_condition", "data_preprocessor", "custom_evaluation_function")
    }
    named["method.function"] = getattr(stage.method, "function", None)
    named["generation.backend"] = getattr(stage.generation, "backend", None)
    for option, value in named.items():
        if not isinstance(value, str) or ":" not in value:
            continue
        module = value.partition(":")[0]
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            yield Problem(
                f"{stage.path}.{option}",
                f"no module {module!r}; is its package installed, or its folder on PYTHONPATH?",
            )
