"""The ground that every declared option stands on: frozen objects, strict keys, all problems at once by path."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from stagekit.errors import ConfigError, Problem


Count = Annotated[int, Field(strict=True, ge=0)]
"""A number of things; 0 is a value (usually "off")."""
Positive = Annotated[int, Field(strict=True, ge=1)]
"""A number of things, at least one."""
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
"""A random seed that numpy takes too."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share between 0 and 1."""
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""A number above 0."""
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""A number of 0 or more."""


def check_function(value: object) -> object:
    """The value, if it is a function or can be the name of one."""
    if callable(value):
        return value
    if isinstance(value, str):
        module, colon, name = value.partition(":")
        parts = [*module.split("."), *name.split(".")]
        if colon and all(part.isidentifier() for part in parts):
            return value
    raise PydanticCustomError(
        "function", "a function is named as 'package.module:function' (or passed itself from Python)"
    )


def is_function_name(text: str) -> bool:
    """Whether a text names a function; what a model's name may begin with (`stage:`, `package:`) is none."""
    module, colon, name = text.partition(":")
    parts = [*module.split("."), *name.split(".")]
    return bool(colon) and module not in {"stage", "package"} and all(part.isidentifier() for part in parts)


Function = Annotated[
    Any,
    BeforeValidator(check_function),
    PlainSerializer(lambda value: function_name(value), return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}),
]
"""A callable, or its name as `package.module:function`."""


def function_name(function: str | Callable[..., Any]) -> str:
    """The `module:qualname` under which a function can be found again."""
    if isinstance(function, str):
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


values_only: ContextVar[bool] = ContextVar("check single values only; the caller looks at the whole", default=False)
_depth: ContextVar[int] = ContextVar("depth of the option object under construction", default=0)


class Options(BaseModel):
    """Base of everything that is declared: frozen, unknown keys refused, what was set explicitly stays known."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    def __init__(self, /, **given: Any) -> None:
        token = _depth.set(_depth.get() + 1)
        try:
            self._build(given)
        except ValidationError as error:
            if _depth.get() > 1:
                raise
            raise ConfigError(problems_of(error, type(self), given)) from None
        finally:
            _depth.reset(token)

    def _build(self, given: dict[str, Any]) -> None:
        BaseModel.__init__(self, **given)

    @model_validator(mode="wrap")
    @classmethod
    def _names_are_text(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """YAML reads a bare `on`, `no` or `5` as no text; such a name cannot be an option."""
        strange = [key for key in value if not isinstance(key, str)] if isinstance(value, Mapping) else []
        raise_problems(cls, [Problem(str(key), f"{key!r} is no name of an option; names are text") for key in strange])
        return handler(value)

    def only_set(self) -> dict[str, Any]:
        """What was set explicitly, as plain data (nested objects too); functions by name, live objects as they are."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set}


class Tagged(Options):
    """Options that say of which kind they are: `type` is always written, set or not."""

    def only_set(self) -> dict[str, Any]:
        """As `Options.only_set`, with the tag first."""
        return {"type": getattr(self, "type"), **super().only_set()}  # noqa: B009 (declared by each subclass)


def _plain(value: Any) -> Any:
    if isinstance(value, Options):
        return value.only_set()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, timedelta):
        return duration_text(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return function_name(value)
    return value


def duration_text(value: timedelta) -> str:
    """A duration as it is declared, in seconds."""
    return f"{value.total_seconds():.15g}s"


Location = tuple[int | str, ...]
"""Where pydantic found something: names, indices, and the tags of unions."""


def raise_problems(
    cls: type[BaseModel],
    problems: Sequence[Problem],
    error: ValidationError | None = None,
    spelled: Callable[[Location], Location] = lambda loc: loc,
) -> None:
    """Raise one ValidationError that holds `problems` (paths relative to `cls`) beside what `error` already has.

    `spelled` turns a location of `error` into the user's spelling of it.
    """
    lines = [
        InitErrorDetails(
            type=PydanticCustomError("stagekit", "{text}", {"text": problem.message}),
            loc=tuple(problem.path.split(".")) if problem.path else (),
            input=None,
        )
        for problem in problems
    ]
    for line in error.errors(include_url=False) if error else []:
        if line["type"] == "stagekit":
            kind: Any = PydanticCustomError("stagekit", "{text}", line["ctx"])
        else:
            kind = PydanticCustomError(f"pydantic:{line['type']}", "{text}", {"text": line["msg"]})
        lines.append(InitErrorDetails(type=kind, loc=spelled(line["loc"]), input=line["input"]))
    if lines:
        raise ValidationError.from_exception_data(cls.__name__, lines)


def problems_of(error: ValidationError, cls: type[BaseModel], given: Any) -> list[Problem]:
    """Every line of a ValidationError as a Problem: path by names, what was given, the nearest name if unknown."""
    found = []
    for line in error.errors(include_url=False):
        path, owner, key = _walk(line["loc"], cls, given)
        kind = line["type"].removeprefix("pydantic:")
        if kind == "extra_forbidden":
            message = unknown(str(key), owner)
        elif kind == "missing":
            message = "missing; it has no default"
        else:
            message = message_of(line)
        problem = Problem(path, message)
        if problem not in found:
            found.append(problem)
    return found


def message_of(line: Mapping[str, Any]) -> str:
    """What to say of one line of a ValidationError about a value."""
    kind = line["type"].removeprefix("pydantic:")
    if kind in {"stagekit", "function"}:
        return str(line["msg"])
    return f"{_rule(kind, line['msg'])}, not {shown(line['input'])}" + _meant(kind, line["msg"], line["input"])


_RULES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "mapping_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}
"""What pydantic's errors are called here; the others keep their words."""


def _rule(kind: str, text: str) -> str:
    return _RULES.get(kind, text[:1].lower() + text[1:]).replace("input should be", "must be")


def _meant(kind: str, text: str, given: Any) -> str:
    close = (
        nearest(given, re.findall(r"'([^']*)'", text)) if kind == "literal_error" and isinstance(given, str) else None
    )
    return f"; did you mean {close!r}?" if close else ""


def shown(value: Any, limit: int = 80) -> str:
    """A value as messages quote it: short."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _walk(loc: Location, cls: type[BaseModel], given: Any) -> tuple[str, type[BaseModel], object]:
    """Turn pydantic's location into the user's path; returns it with the class that owns the last key, and that key.

    A list item is named by its `name`; the tags that pydantic adds for members of a union are left out.
    """
    owner, value, parts, key = cls, given, [], loc[-1] if loc else ""
    members: dict[str, type[BaseModel]] = {}
    for step in loc:
        if isinstance(step, int):
            item = value[step] if isinstance(value, list | tuple) and step < len(value) else None
            name = _name_of(item)
            parts.append(str(name) if isinstance(name, str) and name else str(step))
            value = item
            continue
        if isinstance(value, list | tuple) and any(_name_of(item) == step for item in value):
            parts.append(step)
            value = next(item for item in value if _name_of(item) == step)
            continue
        known = step in owner.model_fields or (isinstance(value, Mapping) and step in value)
        if not known and (step in members or step in UNION_TAGS):
            owner = members.get(step, owner)
            continue
        parts.append(step)
        value = value.get(step) if isinstance(value, Mapping) else getattr(value, step, None)
        if step in owner.model_fields and (nested := _options_in(owner.model_fields[step].annotation)):
            members = {_tag(one) or one.__name__: one for one in nested}
            tag = value if isinstance(value, str) else _type_of(value)
            owner = members.get(str(tag), nested[0])
    return ".".join(parts), owner, key


UNION_TAGS = frozenset({"text", "names", "pair"})
"""Tags of unions whose members are no option classes."""


def _name_of(item: Any) -> Any:
    return item.get("name") if isinstance(item, Mapping) else getattr(item, "name", None)


def _type_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)


def _tag(cls: type[BaseModel]) -> str | None:
    field = cls.model_fields.get("type")
    return str(get_args(field.annotation)[0]) if field is not None and get_args(field.annotation) else None


def _options_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _options_in(inner)]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name most like `name`, if one is near enough to be meant."""
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown(key: str, owner: type[BaseModel]) -> str:
    """What to say of a key that `owner` does not have."""
    foreign = getattr(owner, "foreign", {})
    if key in foreign:
        return f"unknown option; here it is called {foreign[key]!r}"
    close = nearest(key, owner.model_fields)
    if close is not None:
        return f"unknown option; did you mean {close!r}?"
    names = ", ".join(sorted(owner.model_fields))
    return f"unknown option; known are {names}" if len(names) < 300 else "unknown option; see `stagekit stages`"


def with_overrides(raw: Any, assignments: Sequence[str]) -> Any:
    """A copy of plain data with `path.to.key=value` assignments carried out; values are read as YAML.

    A step through a list is an index or the `name` of the item (`stages.rl-cai.method.beta=0.2`).
    Raises ConfigError for assignments without '=' and paths that lead nowhere, all at once.
    """
    import copy

    import yaml

    result, problems = copy.deepcopy(raw), []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            problems.append(Problem(assignment, "an override is written path.to.option=value"))
            continue
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            why = getattr(error, "problem", None) or error
            problems.append(Problem(path, f"the value {text!r} is not YAML: {why}; quote it if it is text"))
            continue
        problem = _assign(result, path.removeprefix("--").split("."), value)
        if problem:
            problems.append(Problem(path, problem))
    if problems:
        raise ConfigError(problems)
    return result


def _assign(target: Any, steps: Sequence[str], value: Any) -> str | None:
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(target, list):
            index = _index(target, step)
            if index is None:
                names = ", ".join(str(item.get("name")) for item in target if isinstance(item, dict))
                return f"no item {step!r} here; " + (f"there are {names}" if names else f"it has {len(target)} items")
            if last:
                target[index] = value
            else:
                target = target[index]
        elif isinstance(target, dict):
            if last:
                target[step] = value
            else:
                inner = target.get(step)
                if isinstance(inner, str) and step == "method":
                    inner = {"type": inner}
                if inner is None:
                    inner = {}
                if not isinstance(inner, dict | list):
                    return f"{'.'.join(steps[: position + 1])} is {inner!r}, it has no options of its own"
                target[step] = inner
                target = inner
        else:
            return f"{'.'.join(steps[:position]) or 'it'} is {shown(target)}, it has no options of its own"
    return None


def _index(items: Sequence[Any], step: str) -> int | None:
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == step:
            return index
    return int(step) if step.isdecimal() and int(step) < len(items) else None
