"""From a YAML file and assignments to a pipeline, with all problems at once."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stagekit.checks import problems_across, problems_on_disk
from stagekit.errors import ConfigError, Problem
from stagekit.flat import path_as_spelled
from stagekit.ledger import problems_of_stage
from stagekit.options import Location, _depth, problems_of, values_only, with_overrides
from stagekit.pipeline import TrainingPipeline
from stagekit.selectors import TABLES


def load(path: str | Path, assignments: Sequence[str] = ()) -> TrainingPipeline:
    """The pipeline in a YAML file, with `path=value` assignments carried out.

    Raises:
        ConfigError: the file cannot be read, or the declaration is wrong; lists every problem.
    """
    return parse(with_overrides(read(path), assignments), str(path))


def read(path: str | Path) -> Any:
    """The plain data of a YAML file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a pipeline's YAML file") from None
    except PermissionError:
        raise ConfigError(f"{path}: cannot be read; check its permissions") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None
    try:
        raw = yaml.load(text, Loader=_Strict)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # 2024-13-01 reads as a date, and is none
        raise ConfigError(f"{path}: a value cannot be read: {error}; quote it if it is text") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deep to be a pipeline") from None
    if raw is None:
        raise ConfigError(f"{path}: is empty; a pipeline is a mapping with name, model and stages")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a pipeline is a mapping with name, model and stages, not {type(raw).__name__}")
    return raw


class _Strict(yaml.SafeLoader):
    """YAML without silent repetition: the same key twice is an error, not the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


def parse(raw: Any, source: str | None = None) -> TrainingPipeline:
    """A pipeline from plain data.

    A wrong value hides what only a whole object can show. So the wrong ones are taken out and the rest is looked at
    again, until nothing new comes: the user sees everything in one go, in the order of the stages.
    """
    given = copy.deepcopy(raw)
    problems = list(_told_apart(given))
    pruned = [problem.path for problem in problems]
    for _ in range(6):
        pipeline, error = _validate(given)
        if error is None:
            break
        found = problems_of(error, TrainingPipeline, given)
        problems += [one for one in found if not _under(one.path, pruned) and one not in problems]
        pruned += [problem.path for problem in found]
        if not _prune(given, error):
            break
    if pipeline is not None:
        depends = [*_alone(pipeline, given), *problems_on_disk(pipeline)]
        problems += [one for one in depends if not _under(one.path, pruned) and not _typeless(one.path, pruned)]
        problems += [one for one in problems_across(pipeline) if not _under(one.path, pruned)]
    if problems:
        raise ConfigError(_in_order(problems, given), source)
    assert pipeline is not None
    return pipeline


def _told_apart(given: Any) -> Iterator[Problem]:
    """Stages that have the name of one before are called by their index, so that a path means one of them."""
    stages = given.get("stages") if isinstance(given, dict) else None
    seen: set[str] = set()
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        name = stage.get("name") if isinstance(stage, dict) else None
        if isinstance(name, str) and name in seen:
            stage["name"] = str(index)
            yield Problem(f"stages.{index}.name", f"{name!r} is taken by another stage; names are unique")
        elif isinstance(name, str):
            seen.add(name)


def _validate(given: Any) -> tuple[TrainingPipeline | None, ValidationError | None]:
    nested, apart = _depth.set(1), values_only.set(True)
    try:
        return TrainingPipeline.model_validate(given), None
    except ValidationError as error:
        return None, error
    finally:
        _depth.reset(nested)
        values_only.reset(apart)


def _alone(pipeline: TrainingPipeline, given: Any) -> Iterator[Problem]:
    """What each stage shows by itself, in the spelling that it was given in."""
    for stage, spelling in zip(pipeline.stages, given["stages"], strict=True):
        for path, message in problems_of_stage(stage):
            spelled = path_as_spelled(spelling, path) if isinstance(spelling, dict) else path
            yield Problem(f"{stage.path}.{spelled}", message)


def _under(path: str, pruned: Sequence[str]) -> bool:
    """Whether a problem is about something that was taken out, so that it only says that it is missing."""
    return any(path == gone or path.startswith(f"{gone}.") or gone.startswith(f"{path}.") for gone in pruned)


def _typeless(path: str, pruned: Sequence[str]) -> bool:
    """Whether the problem's stage lost its type, so that what fits it cannot be said."""
    selectors = (".method", ".method.type", *(f".{name}" for name in TABLES))
    stages = [gone.removesuffix(end) for gone in pruned for end in selectors if gone.endswith(end)]
    return any(path.startswith(f"{stage}.") for stage in stages)


def _in_order(problems: Sequence[Problem], given: Any) -> list[Problem]:
    """The pipeline's own problems, then those of each stage, as the stages stand in the file."""
    stages = given.get("stages") if isinstance(given, dict) else None
    place: dict[str, int] = {}
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        name = stage.get("name") if isinstance(stage, dict) else getattr(stage, "name", None)
        place.update({str(index): index, str(name): index})

    def position(problem: Problem) -> int:
        first, _, rest = problem.path.partition(".")
        return place.get(rest.partition(".")[0], len(place)) if first == "stages" and rest else -1

    return sorted(problems, key=position)


def _prune(given: Any, error: ValidationError) -> bool:
    """Take what is wrong out of the plain data, and put something in for what is missing.

    False where nothing of it could be found.
    """
    lines = error.errors(include_url=False)
    changes = [change for line in lines if (change := _change(given, line["loc"], line["type"])) is not None]
    for container, key, value in changes:
        if value is None:
            container.pop(key, None)
        else:
            container[key] = value
    return bool(changes)


def _change(given: Any, loc: Location, kind: str) -> tuple[Any, Any, Any] | None:
    """The container, the key in it and its new value (None: take it out) that a line of a ValidationError asks for."""
    places, target = [], given
    for step in loc:
        strange = (
            [key for key in target if not isinstance(key, str) and str(key) == step]
            if isinstance(target, dict)
            else []
        )
        if strange:
            return target, strange[0], None
        if _has(target, step):  # the tags of unions are no step in the data
            places.append((target, step))
            target = target[step]
    if kind.endswith("missing") and isinstance(target, dict):
        if loc[-1] == "stages":
            return target, "stages", []
        return target, loc[-1], str(loc[1]) if len(loc) == 3 and loc[-1] == "name" else "missing:missing"
    if kind.endswith("missing") and places and places[-1][1] == "method":
        return places[-1][0], "method", {"type": target, loc[-1]: "missing:missing"}
    while places:
        container, step = places.pop()
        if isinstance(container, dict):
            return container, step, None
        if container is given.get("stages"):
            return container, step, {"name": str(step)}
    return None


def _has(target: Any, step: int | str) -> bool:
    if isinstance(target, list):
        return isinstance(step, int) and step < len(target)
    return isinstance(target, dict) and step in target
