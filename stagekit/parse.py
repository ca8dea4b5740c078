"""From a YAML file and assignments to a pipeline, with all problems at once."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stagekit.checks import problems_across, problems_on_disk
from stagekit.errors import ConfigError, Problem
from stagekit.flat import MOVED
from stagekit.ledger import problems_of_stage
from stagekit.options import _depth, problems_of, values_only, with_overrides
from stagekit.pipeline import TrainingPipeline


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
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None
    try:
        raw = yaml.load(text, Loader=_Strict)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
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
    again, until nothing new comes: the user sees everything in one go.
    """
    given = copy.deepcopy(raw)
    problems: list[Problem] = []
    pruned: list[str] = []
    for _ in range(4):
        pipeline, error = _validate(given)
        if error is None:
            break
        found = problems_of(error, TrainingPipeline, given)
        news = [problem for problem in found if not _under(problem.path, pruned)]
        problems += [problem for problem in news if problem not in problems]
        pruned += [problem.path for problem in found]
        if not _prune(given, error):
            break
    if pipeline is not None:
        across = [problem for problem in problems_across(pipeline) if not _under(problem.path, pruned)]
        alone = [
            Problem(f"{stage.path}.{problem.path}", problem.message)
            for stage in pipeline.stages
            for problem in problems_of_stage(stage)
        ]
        depends = [*alone, *problems_on_disk(pipeline)]
        problems += [one for one in depends if not _under(one.path, pruned) and not _typeless(one.path, pruned)]
        problems += across
    if problems:
        raise ConfigError(problems, source)
    assert pipeline is not None
    return pipeline


def _validate(given: Any) -> tuple[TrainingPipeline | None, ValidationError | None]:
    nested, apart = _depth.set(1), values_only.set(True)
    try:
        return TrainingPipeline(**given), None
    except ValidationError as error:
        return None, error
    finally:
        _depth.reset(nested)
        values_only.reset(apart)


def _under(path: str, pruned: Sequence[str]) -> bool:
    """Whether a problem is about something that was taken out, so that it only says that it is missing."""
    return any(path == gone or path.startswith(f"{gone}.") or gone.startswith(f"{path}.") for gone in pruned)


def _typeless(path: str, pruned: Sequence[str]) -> bool:
    """Whether the problem's stage lost its type, so that what fits it cannot be said."""
    stages = [gone.rsplit(".", 1)[0] for gone in pruned if gone.endswith((".method", ".stage_type"))]
    return any(path.startswith(f"{stage}.") for stage in stages)


def _prune(given: Any, error: ValidationError) -> bool:
    """Take what is wrong out of the plain data. False where something could not be found in it."""
    lines = sorted(error.errors(include_url=False), key=lambda line: [str(step) for step in line["loc"]], reverse=True)
    done = False
    for line in lines:
        place = _flat_place(given, line["loc"])
        target = given
        for step in line["loc"] if place is None else ():
            if not _has(target, step):
                continue
            place = (target, step)
            target = target[step]
        if line["type"].endswith("missing"):
            if isinstance(target, dict):
                target[line["loc"][-1]] = f"unnamed-{line['loc'][-2]}" if len(line["loc"]) > 1 else []
                done = True
        elif place is not None and isinstance(place[0], dict):
            place[0].pop(place[1], None)
            done = True
    return done


def _has(target: Any, step: int | str) -> bool:
    if isinstance(target, list):
        return isinstance(step, int) and step < len(target)
    return isinstance(target, dict) and step in target


def _flat_place(given: Any, loc: tuple[int | str, ...]) -> tuple[Any, Any] | None:
    """Where the flat name stands that a wrong slot value came from."""
    if len(loc) < 4 or loc[0] != "stages":
        return None
    stage = given["stages"][loc[1]]
    group, key = loc[2], loc[-1]
    for name in stage:
        if name in MOVED and MOVED[name].path == f"{group}.{key}":
            return stage, name
    return None
