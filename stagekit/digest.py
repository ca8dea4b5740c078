"""A stage's digest: what its result depends on. Equal digests, equal results; so a finished stage is not run again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagekit.checks import as_data, data_of, functions_of, gives_policy, models_of, module_file, rewards_of, trains
from stagekit.distributed import splits
from stagekit.options import function_name
from stagekit.sources import fingerprint_of_path, parse_data, parse_model


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline
    from stagekit.stage import TrainingStage


FORMAT = 1
"""Raised when stages come to mean something else, so that results of before are not taken for those of now."""

_SAYS_NOTHING = {"description", "tags", "metadata", "enabled", "save_checkpoint_after", "max_duration", "callbacks"}
"""Options that do not change what a stage computes, unless its type says that it reads them. Callbacks observe; and a
stage that ran out of `max_duration` goes on with a longer one (`walk.py`)."""

_SAMPLE_BYTES = 1 << 20


def digests(pipeline: "TrainingPipeline", processes: int = 1) -> dict[str, str | None]:
    """Stage name -> digest. None where a live object takes part: such a stage always runs.

    Args:
        pipeline: The pipeline.
        processes: Over how many the work of a stage that splits it is split: its batches are larger by as much.
            Texts are the same, so stages that only write some do not depend on it.
    """
    found: dict[str, str | None] = {}
    policy = _model_identity(pipeline.model)
    for stage in pipeline.stages:
        start = policy if stage.model is None else _named_model(stage.model, found)
        models = {path: _named_model(value, found) for path, value in models_of(stage)}
        data = {path: _data_identity(value, found) for path, value in data_of(stage)}
        functions = _functions(stage)
        parts = {
            "format": FORMAT,
            "stage": _declared(stage),
            "template": _template(pipeline.chat_template),
            "model": start,
            "models": models,
            "data": data,
            "functions": functions,
            **({"processes": processes} if splits(stage) and trains(stage) else {}),
        }
        named = [*models.values(), *data.values(), *functions.values()]
        known = start is not None and None not in named
        text = json.dumps(parts, sort_keys=True, default=str)
        found[stage.name] = hashlib.sha256(text.encode()).hexdigest() if known else None
        if gives_policy(stage):
            policy = None if found[stage.name] is None else f"stage {stage.name} {found[stage.name]}"
    return found


def _declared(stage: "TrainingStage") -> dict[str, Any]:
    silent = _SAYS_NOTHING - stage.method.reads
    plain = stage.model_dump(mode="python", exclude={*silent, "training_data", "validation_data", "model"})
    for path, _ in models_of(stage):
        plain["method"].pop(path.removeprefix(f"{stage.path}.method."), None)
    rewards = [reward for _, reward in rewards_of(stage)]
    if rewards:
        plain["method"]["reward"] = [{"weight": one.weight, "options": dict(one.options)} for one in rewards]
    return plain


def _template(template: str | None) -> str | None:
    if template is None or "{" in template:
        return template
    return Path(template).read_text(encoding="utf-8")


def _named_model(value: Any, found: Mapping[str, str | None]) -> str | None:
    if isinstance(value, str) and value.startswith("stage:"):
        digest = found.get(value.removeprefix("stage:"))
        return None if digest is None else f"stage {digest}"
    return _model_identity(value)


def _model_identity(value: Any) -> str | None:
    """What tells a model from another without reading all of it: names, sizes, and the ends of every file."""
    if value is None:
        return "none"
    if not isinstance(value, str):
        return None
    source = parse_model(value)
    place = source.path
    if place is None:
        return value
    digest = hashlib.sha256()
    files = sorted(item for item in place.iterdir() if item.is_file()) if place.is_dir() else [place]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            if size > _SAMPLE_BYTES:
                stream.seek(-_SAMPLE_BYTES, 2)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _data_identity(value: Any, found: Mapping[str, str | None]) -> str | None:
    data = as_data(value)
    columns = json.dumps(dict(data.columns), sort_keys=True)
    if not isinstance(data.source, str):
        fingerprint = getattr(data.source, "_fingerprint", None)
        return None if fingerprint is None else f"{fingerprint} {columns}"
    if data.source.startswith("stage:"):
        name, _, dataset = data.source.removeprefix("stage:").partition("/")
        digest = found.get(name)
        return None if digest is None else f"stage {digest} {dataset} {columns}"
    place = parse_data(data.source).path
    identity = fingerprint_of_path(place) if place is not None else data.source
    return f"{identity} {data.split} {columns}"


def _functions(stage: "TrainingStage") -> dict[str, str | None]:
    """Named functions with the content of the file that holds them: an edited function is another function.

    None for a function that its name does not tell from others: a lambda, a closure, a bound method, an instance.
    """
    return {path: _function(value) for path, value in functions_of(stage) if path.split(".")[0] not in _SAYS_NOTHING}


def _function(value: Any) -> str | None:
    live = not isinstance(value, str)
    if live and ("<" in getattr(value, "__qualname__", "<") or getattr(value, "__self__", None) is not None):
        return None
    name = function_name(value)
    try:
        file = module_file(name.partition(":")[0])
    except ModuleNotFoundError:
        file = None
    if file is None:
        return None if live else name
    return f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}"
