"""Rows in text files and conversations in rows: read strictly, written whole or not at all. Standard library only."""

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stagekit.errors import StageError
from stagekit.requests import Message


Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a message may have."""


def rows_of(path: Path, where: str = "") -> Iterator[tuple[int, Row]]:
    """The rows of a .jsonl, .json or .csv file with their line (or row) numbers."""
    readers = {".jsonl": iter_jsonl, ".json": iter_json, ".csv": iter_csv}
    return readers[path.suffix.lower()](path, where)


def iter_jsonl(path: Path, where: str = "") -> Iterator[tuple[int, Row]]:
    """The rows of a JSON lines file with their line numbers, strictly: nothing is skipped, guessed or repaired.

    Only empty lines are passed over, and a byte order mark at the start.

    Raises:
        StageError: broken UTF-8, invalid JSON, a number that JSON does not have, a repeated key or a row that is no
            object; names the file and the line.
    """
    prefix = f"{where}: " if where else ""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{prefix}{path}, line {number}"
            raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if raw.strip():
                yield number, _object(_json(_decoded(raw.rstrip(b"\r\n"), place), place), place)


def iter_json(path: Path, where: str = "") -> Iterator[tuple[int, Row]]:
    """The rows of a JSON file that holds a list of objects, with their numbers from 1; as strict as `iter_jsonl`."""
    place = f"{where}: {path}" if where else str(path)
    rows = _json(_decoded(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), place), place)
    if not isinstance(rows, list):
        raise StageError(f"{place}: holds one {type(rows).__name__}, not a list of objects; wrap the rows in [ ... ]")
    for number, row in enumerate(rows, start=1):
        yield number, _object(row, f"{place}, row {number}")


def iter_csv(path: Path, where: str = "") -> Iterator[tuple[int, Row]]:
    """The rows of a CSV file with their line numbers; every value stays the text that stands there.

    Raises:
        StageError: broken UTF-8, a header that is empty or names a column twice, or a row of another length.
    """
    prefix = f"{where}: " if where else ""
    with path.open("rb") as file:
        lines = (
            _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{prefix}{path}, line {number}")
            for number, line in enumerate(file, start=1)
        )
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader)
            if not all(header) or len(set(header)) < len(header):
                raise StageError(f"{prefix}{path}, line 1: the header {header!r} has an empty or a repeated column")
            for values in reader:
                if values and len(values) != len(header):
                    raise StageError(
                        f"{prefix}{path}, line {reader.line_num}: {len(values)} values for {len(header)} columns "
                        f"({', '.join(header)}); quote values that hold commas or line breaks"
                    )
                if values:
                    yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise StageError(f"{prefix}{path}, line {reader.line_num}: no valid CSV: {error}") from error


def json_object(path: Path) -> Row:
    """The one object that a JSON file holds, read as strictly as the rows are."""
    return _object(_json(_decoded(path.read_bytes(), str(path)), str(path)), str(path))


def write_jsonl(rows: Iterable[Any], path: str | Path) -> None:
    """Write rows as JSON lines; the file is there complete or not at all (temporary file, fsync, rename).

    Raises:
        StageError: the disk is full or not writable, or a row holds what JSON cannot; nothing is left behind.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise StageError(
            f"{target} cannot be written: {error.strerror}; mend the folder or give another one"
        ) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for number, row in enumerate(rows, start=1):
                file.write(_json_line(row, f"{target}, row {number}"))
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise StageError(
            f"{target} cannot be written: {error.strerror}; free some space or give another folder, then run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: str | Path) -> list[Row]:
    """All rows of a JSON lines file, read as strictly as `iter_jsonl` does."""
    return [row for _, row in iter_jsonl(Path(path))]


def as_messages(prompt: object, row: int | None = None, where: str = "") -> tuple[Message, ...]:
    """A prompt as messages: a string becomes one user message, a list of messages is checked.

    Keys without a value are left out: Arrow fills them with null in rows that lack them.

    Args:
        prompt: A string, or a list of `{"role": ..., "content": ...}`.
        row: The row's index from 0, for messages.
        where: The option's path, for messages.

    Raises:
        StageError: neither of the two, an empty list, an unknown role or a content that is no text.
    """
    place = ": ".join(part for part in (where, None if row is None else f"row {row + 1}") if part)
    prefix = f"{place}: " if place else ""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if not isinstance(prompt, Sequence) or not prompt:
        raise StageError(f"{prefix}{prompt!r} is neither a text nor a list of messages")
    return tuple(_message(turn, f"{prefix}message {number}") for number, turn in enumerate(prompt, start=1))


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{raw[error.start]:02x}"
        raise StageError(f"{place}: broken UTF-8 ({byte}); save the file as UTF-8, or mend this line") from error


def _json(text: str, place: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise StageError(f"{place}: {constant} is no JSON value; write null or leave the row out")

    def whole(digits: str) -> int:
        number = int(digits)
        if not -(2**63) <= number < 2**63:
            raise StageError(f"{place}: the number {digits} does not fit into 64 bits; write it as a text")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise StageError(f"{place}: the key {twice!r} stands twice in one object; only one can be meant")
        return row

    try:
        value = json.loads(text, parse_int=whole, parse_constant=refuse, object_pairs_hook=unique)
        if "\\u" in text:  # an escaped half of a surrogate pair is valid JSON but no text
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        column = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        hint = "; one object per line: is this a .jsonl file?" if error.msg == "Extra data" else ""
        raise StageError(f"{place}: invalid JSON at {column}: {error.msg}{hint}") from error
    except UnicodeEncodeError as error:
        raise StageError(f"{place}: a lone surrogate (\\ud800 to \\udfff) is no text; mend the escape") from error
    except (RecursionError, ValueError) as error:
        raise StageError(f"{place}: nested too deeply, or a number with too many digits: {error}") from error
    return value


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        kind = {"list": "a list", "str": "a string", "NoneType": "null"}.get(type(value).__name__, "a number or bool")
        raise StageError(f'{place}: the row is {kind}, not an object like {{"prompt": "..."}}')
    return value


def _json_line(row: Mapping[str, Any], place: str) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise StageError(f"{place}: {error}; JSON lines hold text, finite numbers, lists and objects") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _message(turn: object, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise StageError(f'{place} is {turn!r}, not an object like {{"role": "user", "content": "..."}}')
    role = turn.get("role")
    if role not in ROLES:
        hint = "; rename from/value to role/content" if "from" in turn else ""
        raise StageError(f"{place} has role {role!r}; roles are {', '.join(ROLES)}{hint}")
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise StageError(f"{place} ({role}) has content {content!r}; only text is supported")
    rest = {key: value for key, value in turn.items() if value is not None and key not in ("role", "content")}
    return {"role": role, "content": content, **rest}
