"""What must hold between stages, and on disk, before anything is loaded. Imports no torch; a second at most."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagekit.arguments import RESERVED, ignored_in_trl
from stagekit.errors import Problem
from stagekit.groups import Data, RewardSource, is_function, is_server
from stagekit.measures import problems_of_libraries, text_metrics_of
from stagekit.options import nearest
from stagekit.reward_options import columns_of, problems_on_this_machine
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
    if isinstance(pipeline.model, str) and pipeline.model.startswith("stage:"):
        problems.append(Problem("model", f"{pipeline.model!r} is no model to start from; a stage's own model can be"))
    if pipeline.output_dir is None and (not slug(pipeline.name) or "/" in pipeline.name):
        problems.append(Problem("name", f"{pipeline.name!r} cannot name a folder; set output_dir, or use letters"))
    seen: dict[str, TrainingStage] = {}
    folders: dict[str, str] = {}
    has_model = pipeline.model is not None
    for index, stage in enumerate(pipeline.stages):
        problems += _name(stage, seen, folders)
        if stage.model is None and not has_model and stage.method.type != "custom":
            message = "missing; say which model the first stage starts from"
            before = f"missing; no stage before {stage.name!r} leaves a model"
            problems.append(Problem("model", message) if index == 0 else Problem(f"{stage.path}.model", before))
        has_model = has_model or gives_policy(stage)
        problems += _references(stage, seen, pipeline)
        problems += _arguments(stage)
        seen[stage.name] = stage
        folders[slug(stage.name)] = stage.name
    return problems


def _name(stage: "TrainingStage", seen: Mapping[str, Any], folders: Mapping[str, str]) -> Iterable[Problem]:
    name, path = stage.name, f"{stage.path}.name"
    if name in seen:
        yield Problem(path, f"{name!r} is taken by another stage; names are unique")
    elif not slug(name) or set(name) & set("./="):
        yield Problem(path, f"{name!r} cannot name a folder and a path; use letters, digits, - and _")
    elif slug(name) in folders:
        yield Problem(path, f"{name!r} has the same folder as {folders[slug(name)]!r}")


def trains(stage: "TrainingStage") -> bool:
    """Whether the stage, as declared, trains a model, or may: a custom stage does what its function does."""
    can = stage.method.trains or stage.method.type == "custom"
    return stage.enabled and can and not stage.is_evaluation_only


def gives_policy(stage: "TrainingStage") -> bool:
    """Whether the stage, as declared, ends with a model that later stages start from; a reward model is none."""
    return trains(stage) and stage.method.artifact == "policy"


def models_of(stage: "TrainingStage") -> Iterator[tuple[str, Any]]:
    """Path and value of every model that the stage names."""
    if stage.model is not None:
        yield f"{stage.path}.model", stage.model
    for option in ("critique_model", "teacher", "judge"):
        value = getattr(stage.method, option, None)
        if value is not None and not is_function(value) and not is_server(value):
            yield f"{stage.path}.method.{option}", value
    scorer = stage.text_metrics.reward_model if stage.text_metrics is not None else None
    if scorer is not None and not is_function(scorer):
        yield _scorer_path(stage), scorer
    for option, reward in rewards_of(stage):
        if not is_function(reward.source):
            yield f"{stage.path}.{option}", reward.source


def _scorer_path(stage: "TrainingStage") -> str:
    return f"{stage.path}.text_metrics.reward_model"


def rewards_of(stage: "TrainingStage") -> Iterator[tuple[str, RewardSource]]:
    """Path inside the stage and value of every reward that the stage names."""
    rewards = getattr(stage.method, "reward", None)
    several = isinstance(rewards, tuple) and len(rewards) > 1
    for number, reward in enumerate(rewards if isinstance(rewards, tuple) else ()):
        yield f"method.reward.{number}" if several else "method.reward", reward


def data_of(stage: "TrainingStage") -> Iterator[tuple[str, Any]]:
    """Path and value of every set of data that the stage names."""
    for option in ("training_data", "validation_data"):
        value = getattr(stage, option)
        if isinstance(value, Mapping):
            for name, item in value.items():
                yield f"{stage.path}.{option}.{name}", item
        elif value is not None:
            yield f"{stage.path}.{option}", value


def as_data(value: Any) -> Data:
    """A set of data as a `Data` object."""
    return value if isinstance(value, Data) else Data(value)


def _references(
    stage: "TrainingStage", seen: Mapping[str, "TrainingStage"], pipeline: "TrainingPipeline"
) -> Iterable[Problem]:
    for path, value in models_of(stage):
        if isinstance(value, str) and value.startswith("stage:"):
            name = value.removeprefix("stage:")
            found = list(_earlier(path, name, seen, pipeline))
            yield from found
            if not found and path == _scorer_path(stage):
                yield from _scores(path, seen[name])
            elif path.startswith(f"{stage.path}.method.reward"):
                if not found:
                    yield from _rewards_with(path, seen[name])
            elif not found and not gives_policy(seen[name]) and not _goes_on(stage, path, seen[name]):
                yield Problem(path, f"stage {name!r} leaves no model ({_why_no_policy(seen[name])})")
    for path, value in data_of(stage):
        source = as_data(value).source
        if not isinstance(source, str) or not source.startswith("stage:"):
            continue
        name, _, dataset = source.removeprefix("stage:").partition("/")
        found = list(_earlier(path, name, seen, pipeline))
        yield from found
        if found:
            continue
        makes, own = seen[name].method.makes, seen[name].method.type == "custom"
        if not seen[name].enabled:
            yield Problem(path, f"stage {name!r} has enabled: false, so it leaves no dataset")
        elif not dataset or not (own or dataset in makes):
            have = ", ".join(makes) or ("what its function returns" if own else "none")
            yield Problem(
                path, f"stage {name!r} leaves no dataset {dataset!r}; it leaves: {have} (write stage:{name}/DATASET)"
            )


def _rewards_with(path: str, before: "TrainingStage") -> Iterable[Problem]:
    """A stage that is to score answers leaves a reward model, of whole answers or of their steps."""
    if not trains(before) or before.method.artifact != "reward_model":
        leaves = _why_no_policy(before) if not trains(before) else f"it is a {before.method.type} stage"
        message = f"stage {before.name!r} leaves no reward model to score with ({leaves})"
        yield Problem(path, f"{message}; name a reward or process_reward stage")


def _goes_on(stage: "TrainingStage", path: str, before: "TrainingStage") -> bool:
    """Whether a stage starts from the reward model of one of its own type."""
    own = stage.method.artifact != "policy" and stage.method.type == before.method.type
    return own and trains(before) and path == f"{stage.path}.model"


def _scores(path: str, before: "TrainingStage") -> Iterable[Problem]:
    """Answers are scored by an outcome reward model."""
    if not trains(before) or before.method.task != "SEQ_CLS":
        leaves = f"a {before.method.artifact}" if trains(before) else "no model"
        message = f"{before.method.type} stage {before.name!r} leaves {leaves}, not a reward model that scores answers"
        yield Problem(path, f"{message}; name a reward stage")


def _why_no_policy(stage: "TrainingStage") -> str:
    if not stage.enabled:
        return "enabled: false"
    if stage.method.artifact != "policy":
        return f"{stage.method.type} leaves a {stage.method.artifact}, and the policy is passed on by itself"
    return "is_evaluation_only: true" if stage.is_evaluation_only else f"{stage.method.type} trains none"


def _earlier(
    path: str, name: str, seen: Mapping[str, "TrainingStage"], pipeline: "TrainingPipeline"
) -> Iterable[Problem]:
    if name in seen:
        return
    if any(stage.name == name for stage in pipeline.stages):
        own = path.startswith(f"stages.{name}.")
        where = "is this one" if own else "comes later"
        yield Problem(path, f"stage {name!r} {where}; only results of earlier stages can be used")
    else:
        close = nearest(name, seen)
        yield Problem(path, f"no stage {name!r} before this one" + (f"; did you mean {close!r}?" if close else ""))


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
    for key, message in ignored_in_trl(stage).items():
        yield Problem(f"{stage.path}.trl.{key}", message)


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
        problems += problems_of_libraries(stage)
        rewards = [reward for _, reward in rewards_of(stage)]
        problems += [Problem(f"{stage.path}.{one.path}", one.message) for one in problems_on_this_machine(rewards)]
    return problems


_WITH_PROMPTS = {"messages", "conversations", "chosen"}
"""Columns that hold a prompt with its answer, so that text metrics can ask it."""


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
    held_out = path == f"{stage.path}.validation_data"
    compared = sorted(set(columns_of([reward for _, reward in rewards_of(stage)])))
    needed = (stage.method.validation_columns if held_out else None) or stage.method.wanted_columns()
    wanted = tuple((*columns, *compared) for columns in needed) if stage.data_preprocessor is None else ()
    if held_out and text_metrics_of(stage):
        wanted = tuple(columns for columns in wanted if "prompt" in columns or columns[0] in _WITH_PROMPTS)
    return problems_of_data(source, path, wanted, data.columns)


def functions_of(stage: "TrainingStage") -> Iterator[tuple[str, Any]]:
    """Path inside the stage and value of every function that the stage names."""
    for option in ("run_condition", "data_preprocessor", "custom_loss_function", "custom_evaluation_function"):
        if getattr(stage, option) is not None:
            yield option, getattr(stage, option)
    for event in type(stage.callbacks).model_fields if stage.callbacks is not None else ():
        if getattr(stage.callbacks, event) is not None:
            yield f"callbacks.{event}", getattr(stage.callbacks, event)
    if getattr(stage.method, "function", None) is not None:
        yield "method.function", getattr(stage.method, "function")  # noqa: B009 (only custom has it)
    for option in ("reward_model", "judge"):
        value = getattr(stage.text_metrics, option, None)
        if value is not None and is_function(value):
            yield f"text_metrics.{option}", value
    judge = getattr(stage.method, "judge", None)
    if judge is not None and is_function(judge):
        yield "method.judge", judge
    for option, reward in rewards_of(stage):
        if is_function(reward.source):
            yield option, reward.source
    if stage.generation is not None and is_function(stage.generation.backend):
        yield "generation.backend", stage.generation.backend


def module_file(module: str) -> Path | None:
    """The file of a module, found without importing anything; None where there is none.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    if module == "__main__":
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if file is not None else None
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ModuleNotFoundError(module)
    if not inner:
        return Path(spec.origin) if spec.has_location and spec.origin else None
    for folder in spec.submodule_search_locations or ():
        place = Path(folder, *inner)
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                return file
        if place.is_dir() or list(place.parent.glob(f"{place.name}.*.so")):
            return None
    raise ModuleNotFoundError(module)


def _functions(stage: "TrainingStage") -> Iterable[Problem]:
    for option, value in functions_of(stage):
        if not isinstance(value, str):
            continue
        module, _, name = value.partition(":")
        path = f"{stage.path}.{option}"
        try:
            file = module_file(module)
        except ModuleNotFoundError:
            message = f"no module {module!r}; is its package installed, or its folder on PYTHONPATH?"
            yield Problem(path, message)
            continue
        names = _names_in(file) if file is not None and file.suffix == ".py" else None
        first = name.partition(".")[0]
        if names is not None and first not in names:
            close = nearest(first, names)
            yield Problem(path, f"{file} has no {first!r}" + (f"; did you mean {close!r}?" if close else ""))


def _names_in(file: Path) -> set[str] | None:
    """The names that a module defines or imports at its top; None where that cannot be read off its text."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif not isinstance(node, ast.Expr):
            return None
    return None if "*" in names or "__getattr__" in names else names
