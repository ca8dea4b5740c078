"""Rewards that can be checked: a completion is right (1) or not (0), by comparing, matching or parsing it.

Each is a reward function as TRL calls it. Where it compares, `column` names the column of the data that holds the
right answer; the last keyword arguments are the other columns. `extract` is a regular expression whose first group (or
whole match) is the answer within the completion, the last match where there are several; a completion without a match
is wrong. Nothing of a completion is ever executed.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stagekit.errors import ConfigError
from stagekit.rewards import text_of


_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+])?"  # in 2-3 the dash is no sign
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?:\s*/\s*\d+(?:\.\d+)?)?(?:\s*%)?"
)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def exact(
    completions: Sequence[Any],
    *,
    column: str = "answer",
    extract: str | None = None,
    ignore_case: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where the completion, without white space at its ends, is the text in `column`.

    Args:
        completions: Texts or conversations.
        column: The column with the right answers.
        extract: See above.
        ignore_case: Whether `Paris` and `paris` are the same.
        columns: The columns of the data.
    """

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    wanted = [plain(str(answer)) for answer in _answers(columns, column, "exact")]
    found = [_extracted(text_of(completion), extract) for completion in completions]
    return [float(text is not None and plain(text) == answer) for text, answer in zip(found, wanted, strict=True)]


def numeric(
    completions: Sequence[Any],
    *,
    column: str = "answer",
    extract: str | None = None,
    tolerance: float = 1e-6,
    **columns: Any,
) -> list[float]:
    """1 where the last number of the completion is the number in `column`.

    Numbers may have thousands separators (1,234.5), exponents, a percent sign (50% is 0.5) or be fractions (3/4).

    Args:
        completions: Texts or conversations.
        column: The column with the right numbers, as numbers or as text whose last number counts.
        extract: See above; the last number of what it finds counts.
        tolerance: Largest difference, relative to the right number (absolute around 0).
        columns: The columns of the data.

    Raises:
        ConfigError: an answer in `column` has no number.
    """
    rewards = []
    for completion, answer in zip(completions, _answers(columns, column, "numeric"), strict=True):
        right = last_number(str(answer))
        if right is None:
            raise ConfigError(f"reward numeric: {answer!r} in column {column!r} has no number")
        text = _extracted(text_of(completion), extract)
        said = last_number(text) if text is not None else None
        close = said is not None and math.isclose(said, right, rel_tol=tolerance, abs_tol=tolerance)
        rewards.append(float(close))
    return rewards


def regex(
    completions: Sequence[Any], *, pattern: str | None = None, whole: bool = False, **columns: Any
) -> list[float]:
    """1 where the completion matches the pattern somewhere.

    Args:
        completions: Texts or conversations.
        pattern: A regular expression of Python's `re`.
        whole: Whether all of the completion, without white space at its ends, must match.
        columns: The columns of the data; none is read.

    Raises:
        ConfigError: there is no pattern, or it is none.
    """
    if pattern is None:
        raise ConfigError("reward regex: options.pattern is missing; say what must match")
    compiled = _compiled(pattern, "regex")
    texts = [text_of(completion) for completion in completions]
    return [
        float((compiled.fullmatch(text.strip()) if whole else compiled.search(text)) is not None) for text in texts
    ]


def format(completions: Sequence[Any], *, tags: Sequence[str] = ("think", "answer"), **columns: Any) -> list[float]:
    """1 where the completion is `<think>...</think><answer>...</answer>`: each tag once, in order, nothing beside.

    Args:
        completions: Texts or conversations.
        tags: The names of the tags.
        columns: The columns of the data; none is read.

    Raises:
        ConfigError: there are no tags.
    """
    if isinstance(tags, str) or not tags:
        raise ConfigError(f"reward format: options.tags is {tags!r}; give a list of names")
    inside = rf"(?:(?!</?(?:{'|'.join(map(re.escape, tags))})>).)*"
    blocks = [f"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in tags]
    compiled = re.compile(r"\s*" + r"\s*".join(blocks) + r"\s*", re.DOTALL)
    return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]


def json_schema(completions: Sequence[Any], *, schema: Mapping[str, Any] | None = None, **columns: Any) -> list[float]:
    """1 where the completion is JSON, alone or as the only thing in a fenced block, that fits the schema.

    The schema has these keywords of JSON Schema: type, enum, const, properties, required, additionalProperties (true
    or false), items, minItems, maxItems, minLength, maxLength, pattern, minimum, maximum, and title and description,
    which say nothing. Any other is an error: a rule that is not looked at would be learned to be broken.

    Args:
        completions: Texts or conversations.
        schema: The schema; None: any JSON will do.
        columns: The columns of the data; none is read.

    Raises:
        ConfigError: the schema has a keyword that is not among them.
    """
    rule = schema if schema is not None else {}
    check_schema(rule)
    rewards = []
    for completion in completions:
        text = text_of(completion)
        blocks = _FENCE.findall(text)
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_no_json)
        except (ValueError, RecursionError):
            rewards.append(0.0)
        else:
            rewards.append(float(fits(value, rule)))
    return rewards


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none, or it is none that a float can hold."""
    found = [match.strip() for match in _NUMBER.findall(text)]
    if not found:
        return None
    number = found[-1].replace(",", "").replace(" ", "")
    top, _, bottom = number.removesuffix("%").partition("/")
    divisor = float(bottom or 1) * (100 if number.endswith("%") else 1)
    value = float(top) / divisor if divisor else math.inf
    return value if math.isfinite(value) else None


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
        _compiled(schema["pattern"], f"json_schema, {path}.pattern")
    for name, rule in schema.get("properties", {}).items():
        check_schema(rule, f"{path}.properties.{name}")
    if "items" in schema:
        check_schema(schema["items"], f"{path}.items")


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # Python's parser takes NaN and Infinity


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON, where true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _answers(columns: Mapping[str, Any], column: str, name: str) -> Sequence[Any]:
    if not isinstance(columns.get(column), Sequence):
        have = sorted(key for key, value in columns.items() if isinstance(value, list) and key != "completion_ids")
        raise ConfigError(
            f"reward {name}: the data have no column {column!r} with the right answers; they have "
            f"{', '.join(have) or 'none'}. Name yours with options: {{column: YOUR_COLUMN}}"
        )
    answers: Sequence[Any] = columns[column]
    return answers


def _extracted(text: str, extract: str | None) -> str | None:
    if extract is None:
        return text
    found = list(_compiled(extract, "extract").finditer(text))
    if not found:
        return None
    return found[-1].group(1 if found[-1].re.groups else 0)


def _compiled(pattern: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"reward {where}: {pattern!r} is no regular expression: {error}") from None
