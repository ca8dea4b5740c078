"""Rewards that can be checked: a completion is right (1) or not (0), by comparing, matching, parsing or testing it.

Each is a reward function as TRL calls it. Where it compares, `column` names the column of the data that holds the
right answer; the last keyword arguments are the other columns. `extract` is a regular expression whose first group (or
whole match) is the answer within the completion, the last match where there are several; a completion without a match
is wrong. Nothing of a completion is executed but by `python_tests`, in a sandbox (`stagekit.sandbox`); nothing ever in
the process that trains.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from stagekit import maths as mathematics
from stagekit import sandbox
from stagekit.errors import ConfigError
from stagekit.json_schemas import check_schema, compiled, fits
from stagekit.options import NonNegativeFloat, Positive, PositiveFloat
from stagekit.rewards import text_of


_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+])?"  # in 2-3 the dash is no sign
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?:\s*/\s*\d+(?:\.\d+)?)?(?:\s*%)?"
)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_PYTHON = re.compile(r"^```(?:python3?|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def _as_option(check: Callable[[Any], object]) -> AfterValidator:
    """A check that raises ConfigError, as what `stagekit check` asks of an option before anything is loaded."""

    def checked(value: Any) -> Any:
        try:
            check(value)
        except ConfigError as error:
            raise PydanticCustomError("stagekit", "{text}", {"text": str(error)}) from None
        return value

    return AfterValidator(checked)


def _pattern(value: Any) -> None:
    if value is not None:
        compiled(value, "extract")


def _needed_pattern(value: Any) -> None:
    if value is None:
        raise ConfigError("reward regex: options.pattern is missing; say what must match")
    compiled(value, "regex")


def _tags(value: Any) -> None:
    if isinstance(value, str) or not value:
        raise ConfigError(f"reward format: options.tags is {value!r}; give a list of names")


def _schema(value: Any) -> None:
    if value is not None:
        check_schema(value)


Extract = Annotated[str | None, _as_option(_pattern)]
"""A regular expression that finds the answer in a completion."""


def exact(
    completions: Sequence[Any],
    *,
    column: str = "answer",
    extract: Extract = None,
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
    extract: Extract = None,
    tolerance: NonNegativeFloat = 1e-6,
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
    completions: Sequence[Any],
    *,
    pattern: Annotated[str | None, _as_option(_needed_pattern)] = None,
    whole: bool = False,
    **columns: Any,
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
    _needed_pattern(pattern)
    found = compiled(pattern, "regex")
    texts = [text_of(completion) for completion in completions]
    return [float((found.fullmatch(text.strip()) if whole else found.search(text)) is not None) for text in texts]


def format(
    completions: Sequence[Any],
    *,
    tags: Annotated[Sequence[str], _as_option(_tags)] = ("think", "answer"),
    **columns: Any,
) -> list[float]:
    """1 where the completion is `<think>...</think><answer>...</answer>`: each tag once, in order, nothing beside.

    Args:
        completions: Texts or conversations.
        tags: The names of the tags.
        columns: The columns of the data; none is read.

    Raises:
        ConfigError: there are no tags.
    """
    _tags(tags)
    inside = rf"(?:(?!</?(?:{'|'.join(map(re.escape, tags))})>).)*"
    blocks = [f"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in tags]
    shape = re.compile(r"\s*" + r"\s*".join(blocks) + r"\s*", re.DOTALL)
    return [float(shape.fullmatch(text_of(completion)) is not None) for completion in completions]


def json_schema(
    completions: Sequence[Any],
    *,
    schema: Annotated[Mapping[str, Any] | None, _as_option(_schema)] = None,
    **columns: Any,
) -> list[float]:
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


def maths(
    completions: Sequence[Any],
    *,
    column: str = "answer",
    extract: Extract = None,
    boxed: bool = False,
    cpu_seconds: Positive = 5,
    **columns: Any,
) -> list[float]:
    """1 where the completion's answer equals the one in `column` as mathematics, by the package math-verify.

    Numbers, fractions, sets, intervals, matrices, expressions and equations, in LaTeX or plain: 1/2 is
    `\\frac{2}{4}` and 0.5, 50% is 0.5 (and 50), a unit plays no part, {1, 2} is {2, 1}. Of a completion counts the
    last `\\boxed{}`, else the mathematics that it ends with. Words are letters multiplied; compare them with `exact`.

    Args:
        completions: Texts or conversations.
        column: The column with the right answers: the answer alone, or a text that marks it as mathematics.
        extract: See above; all of what it finds is the answer.
        boxed: Whether a completion without `\\boxed{}` is wrong.
        cpu_seconds: CPU time for one comparison; one that takes more is wrong, such as one with 9^9^9^9.
        columns: The columns of the data.

    Raises:
        ConfigError: an answer in `column` is no mathematics.
    """
    comparisons, places = [], []
    for place, (completion, gold) in enumerate(zip(completions, _answers(columns, column, "maths"), strict=True)):
        said = _extracted(text_of(completion), extract)
        if said is not None:
            whole = extract is not None
            comparisons.append(mathematics.Comparison(str(gold), said, whole, boxed, cpu_seconds))
            places.append(place)
    try:
        found = mathematics.equal(comparisons)
    except mathematics.Unreadable as error:
        raise ConfigError(f"reward maths: an answer in column {column!r} is none: {error}") from None
    rewards = [0.0] * len(completions)
    for place, equal in zip(places, found, strict=True):
        rewards[place] = float(equal)
    return rewards


def python_tests(
    completions: Sequence[Any],
    *,
    column: str = "tests",
    extract: Extract = None,
    all_or_nothing: bool = False,
    cpu_seconds: Positive = 5,
    wall_seconds: PositiveFloat = 20.0,
    memory_mb: Positive = 512,
    files_mb: Positive = 16,
    processes: Positive = 16,
    packages: bool = False,
    unsafe: bool = False,
    **columns: Any,
) -> list[float]:
    """The share of tests that the completion's Python code passes, run in a sandbox (`stagekit.sandbox`, Linux).

    The code is the last fenced block that is python or of no named language; without a fence, all of the completion. A
    test is Python code that ends without an exception, for instance `assert f(1) == 2`. It is executed after the code,
    in the same interpreter, on a copy of its names, and fails where the process leaves or is ended before it is done.
    `__name__` is `completion`, so what the code does as a script is not done. An object with an `__eq__` of the code's
    own is equal to no plain data (numbers, texts, lists of them), so that no answer is equal to all.

    Args:
        completions: Texts or conversations.
        column: The column with the tests: a list, or one text that is one test.
        extract: See above; what it finds is the code.
        all_or_nothing: 1 where all tests pass, else 0.
        cpu_seconds: CPU time of a process of the code.
        wall_seconds: Time for the code and its tests.
        memory_mb: Address space of a process of the code.
        files_mb: What the code may write, in all.
        processes: Processes and threads at a time, with the two that are there before the code starts any.
        packages: Whether the code may import the packages that are installed here, beside the standard library.
        unsafe: Run the code also where the kernel refuses a part of the sandbox, with the parts that there are.
        columns: The columns of the data.

    Raises:
        ConfigError: a row has no tests.
        StageError: the kernel refuses a part of the sandbox.
    """
    tests = [_tests(one, column) for one in _answers(columns, column, "python_tests")]
    codes = [_code(text_of(completion), extract) for completion in completions]
    limits = sandbox.Limits(cpu_seconds, wall_seconds, memory_mb, files_mb, processes)
    runs = [place for place, code in enumerate(codes) if code is not None]
    passed = sandbox.passed(
        [codes[place] or "" for place in runs],
        [tests[place] for place in runs],
        limits,
        packages=packages,
        unsafe=unsafe,
    )
    rewards = [0.0] * len(completions)
    for place, count in zip(runs, passed, strict=True):
        share = count / len(tests[place])
        rewards[place] = float(share == 1) if all_or_nothing else share
    return rewards


def _tests(given: Any, column: str) -> list[str]:
    tests = [given] if isinstance(given, str) else given
    good = isinstance(tests, Sequence) and all(isinstance(one, str) and one.strip() for one in tests)
    if not good or not tests:
        raise ConfigError(
            f"reward python_tests: {given!r} in column {column!r} is no test; a row has a list of texts such as "
            "'assert f(1) == 2', or one text"
        )
    return list(tests)


def _code(text: str, extract: str | None) -> str | None:
    """The code of a completion; None where it has none."""
    if extract is not None:
        found = _extracted(text, extract)
    else:
        blocks = _PYTHON.findall(text)
        found = blocks[-1] if blocks else text
    return found if found is not None and found.strip() else None


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


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # Python's parser takes NaN and Infinity


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
    found = list(compiled(extract, "extract").finditer(text))
    if not found:
        return None
    return found[-1].group(1 if found[-1].re.groups else 0)
