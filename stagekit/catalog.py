"""The stage types and their options, for `stagekit stages`, and the JSON schema of a pipeline file."""

from collections.abc import Sequence
from typing import Any, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from stagekit.adapters import METHODS
from stagekit.adapters.base import Method
from stagekit.errors import ConfigError
from stagekit.flat import MOVED, doc_of
from stagekit.groups import Generation, LoRA, Reference, TextMetrics
from stagekit.ledger import not_applicable
from stagekit.options import Options, nearest
from stagekit.pending import PENDING
from stagekit.pipeline import TrainingPipeline
from stagekit.stage import TrainingStage


def catalog(kind: str | None = None) -> list[dict[str, Any]]:
    """Every stage type, or one: `{type, summary, paper, built, options: [{option, default, about, state}]}`.

    Raises:
        ConfigError: there is no such type.
    """
    if kind is not None and kind not in METHODS:
        close = nearest(kind, METHODS)
        raise ConfigError(
            f"no stage type {kind!r}; " + (f"did you mean {close!r}?" if close else f"there are {', '.join(METHODS)}")
        )
    chosen = [kind] if kind is not None else list(METHODS)
    return [_entry(name, METHODS[name]) for name in chosen]


def _entry(name: str, cls: type[Method]) -> dict[str, Any]:
    options = [_option(f"method.{key}", field, name) for key, field in cls.model_fields.items() if key != "type"]
    stage = TrainingStage.model_construct(name="stage", method=cast(Any, cls.model_construct()))
    for key, field in TrainingStage.model_fields.items():
        if key != "method" and not_applicable(stage, key) is None:
            options.append(_option(key, field, name))
            options += [_option(f"{key}.{inner}", one, name) for inner, one in _group(key)]
    built = cls.missing is None
    return {"type": name, "summary": cls.summary, "paper": cls.paper, "built": built, "options": options}


def _group(key: str) -> Sequence[tuple[str, FieldInfo]]:
    groups: dict[str, type[Options]] = {
        "lora": LoRA,
        "reference": Reference,
        "generation": Generation,
        "text_metrics": TextMetrics,
    }
    return list(groups[key].model_fields.items()) if key in groups else []


def _option(path: str, field: FieldInfo, kind: str) -> dict[str, Any]:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    shown = default.model_dump() if isinstance(default, Options) else default
    return {
        "option": path,
        "values": _values(field.annotation),
        "default": "required" if field.is_required() else shown,
        "about": field.description,
        "state": "not built" if _is_pending(path, kind) else "effective",
    }


def _is_pending(path: str, kind: str) -> bool:
    if path in PENDING:
        return True
    return any(
        home.path == path and name in PENDING and (not home.types or kind in home.types)
        for name, home in MOVED.items()
    )


def _values(annotation: Any) -> list[Any] | None:
    """The values of a closed set; None for an open one."""
    if get_origin(annotation) is not None and all(not hasattr(one, "__mro__") for one in get_args(annotation)):
        values = [value for value in get_args(annotation) if isinstance(value, str | int)]
        return values or None
    return None


def catalog_text(kind: str | None = None) -> str:
    """The catalog as text."""
    entries = catalog(kind)
    if kind is None:
        width = max(len(entry["type"]) for entry in entries)
        lines = [
            f"{entry['type']:<{width}}  {entry['summary']}" + ("" if entry["built"] else "  (not built yet)")
            for entry in entries
        ]
        return "\n".join([*lines, "", "`stagekit stages TYPE` lists the options of one."])
    entry = entries[0]
    lines = [f"{entry['type']}: {entry['summary']}"]
    lines += [f"source: {entry['paper']}"] if entry["paper"] else []
    lines += ["not built yet"] if not entry["built"] else []
    for option in entry["options"]:
        about = " ".join(str(option["about"] or "").split())
        state = "" if option["state"] == "effective" else " (not built yet)"
        values = f"\n      one of {', '.join(map(str, option['values']))}" if option["values"] else ""
        lines.append(f"\n  {option['option']} = {option['default']!r}{state}{values}\n      {about}")
    return "\n".join(lines)


def schema() -> dict[str, Any]:
    """The JSON schema of a pipeline file, the flat names at the door included."""
    made = TrainingPipeline.model_json_schema()
    stage = made["$defs"]["TrainingStage"]
    for name in MOVED:
        stage["properties"].setdefault(name, {"description": f"{MOVED[name].path}: {doc_of(name)}"})
    method = stage["properties"]["method"]
    default = method.pop("default", None)
    about = method.pop("description", None)
    stage["properties"]["method"] = {
        "anyOf": [{"enum": list(METHODS)}, method],
        "default": default,
        "description": about,
    }
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return made
