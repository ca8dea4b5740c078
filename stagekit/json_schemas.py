"""The part of JSON Schema that the verifier `json_schema` looks at."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stagekit.errors import ConfigError


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: not isinstance(value, bool) and isinstance(value, int | float) and value == value // 1,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
_OF_STRING: Mapping[str, Callable[[str, Any], bool]] = {
    "minLength": lambda value, limit: len(value) >= limit,
    "maxLength": lambda value, limit: len(value) <= limit,
    "pattern": lambda value, pattern: re.search(pattern, value) is not None,
}
_OF_NUMBER: Mapping[str, Callable[[float, Any], bool]] = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
}
_OF_ARRAY: Mapping[str, Callable[[list[Any], Any], bool]] = {
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
    "items": lambda value, rule: all(fits(item, rule) for item in value),
}
_OF_OBJECT: Mapping[str, Callable[[dict[str, Any], Any], bool]] = {
    "required": lambda value, names: set(names) <= set(value),
    "properties": lambda value, rules: all(fits(value[name], rule) for name, rule in rules.items() if name in value),
}
_OF_ANY: Mapping[str, Callable[[Any, Any], bool]] = {
    "type": lambda value, names: any(_TYPES[name](value) for name in ([names] if isinstance(names, str) else names)),
    "enum": lambda value, allowed: any(_same(value, one) for one in allowed),
    "const": lambda value, wanted: _same(value, wanted),
}
_BY_TYPE: Sequence[tuple[str, Mapping[str, Callable[[Any, Any], bool]]]] = (
    ("string", _OF_STRING),
    ("number", _OF_NUMBER),
    ("array", _OF_ARRAY),
    ("object", _OF_OBJECT),
)
_KNOWN = {*_OF_ANY, *(key for _, rules in _BY_TYPE for key in rules), "additionalProperties", "title", "description"}


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value parsed from JSON fits a schema of the keywords of `json_schema`."""
    rules = dict(_OF_ANY)
    for kind, own in _BY_TYPE:
        if _TYPES[kind](value):
            rules.update(own)
    closed = isinstance(value, dict) and schema.get("additionalProperties") is False
    if closed and not set(value) <= set(schema.get("properties", {})):
        return False
    return all(holds(value, schema[key]) for key, holds in rules.items() if key in schema)


def check_schema(schema: Any, path: str = "schema") -> None:
    """See that a schema has keywords and types that `fits` looks at.

    Raises:
        ConfigError: it has another; with its path.
    """
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{path}: {schema!r} is no schema; it is a mapping")
    strange = sorted(set(schema) - _KNOWN)
    if strange:
        raise ConfigError(f"{path}.{strange[0]}: is not looked at; known are {', '.join(sorted(_KNOWN))}")
    names = schema.get("type", [])
    for name in [names] if isinstance(names, str) else names:
        if name not in _TYPES:
            raise ConfigError(f"{path}.type: {name!r} is no type of JSON; known are {', '.join(_TYPES)}")
    if not isinstance(schema.get("additionalProperties", True), bool):
        raise ConfigError(f"{path}.additionalProperties: is true or false here")
    if "pattern" in schema:
        compiled(schema["pattern"], f"json_schema, {path}.pattern")
    for name, rule in schema.get("properties", {}).items():
        check_schema(rule, f"{path}.properties.{name}")
    if "items" in schema:
        check_schema(schema["items"], f"{path}.items")


def compiled(pattern: Any, where: str) -> re.Pattern[str]:
    """A regular expression of a reward.

    Raises:
        ConfigError: the pattern is none; names `where` it stands.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"reward {where}: {pattern!r} is no regular expression: {error}") from None


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON, where true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
