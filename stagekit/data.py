"""Rows on their way to a trainer: loaded, renamed, checked, mixed, shuffled and written.

Text files are read by the strict readers of `sources.py` into memory: no derived file in a cache can go stale, and an
error names the line. Everything random depends on a seed that is passed in.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    LargeList,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from stagekit.errors import ConfigError, Problem, StageError
from stagekit.mixing import mixing_counts
from stagekit.rows import Row, as_messages, read_jsonl, rows_of, write_jsonl
from stagekit.sources import DataSource, missing_columns, parse_data, problems_of_data, renamed_columns


__all__ = [
    "as_messages",
    "check_columns",
    "fingerprint",
    "load_data",
    "mix",
    "mixing_counts",
    "read_jsonl",
    "shuffled",
    "take",
    "write_jsonl",
]

_IN_MEMORY_BYTES = 2 << 30
"""A saved dataset above this size stays memory-mapped."""

_EXACT_FLOAT = 2**53


def load_data(
    source: str | Dataset | DatasetDict | Mapping[str, Sequence[Any]],
    *,
    where: str,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    stage_datasets: Callable[[str, str], Path] | None = None,
) -> Dataset:
    """The rows that a data option names, in memory or memory-mapped, never through a cache of derived files.

    Args:
        source: A name as `parse_data` takes it, a live dataset, or a mapping column -> values.
        where: The option's path, for messages: `stages.sft.training_data`.
        split: Which split of a hub dataset or a dataset dict; slices such as `train[:100]` for hub datasets only.
        columns: Renames, ours to theirs: `{"prompt": "question"}`.
        stage_datasets: Finds the file of `stage:NAME/DATASET`.

    Raises:
        ConfigError: the declaration is wrong: a missing file, split or column.
        StageError: the content is wrong: a broken line, differing rows, no rows.
    """
    if isinstance(source, str):
        dataset = _load_named(source, where, split, columns or {}, stage_datasets)
    else:
        dataset = _live(source, where, split)
    if columns:
        dataset = _renamed(dataset, columns, where)
    if len(dataset) == 0:
        raise StageError(f"{where}: {_shown(source)} holds no rows; there is nothing to train on")
    return dataset


def mix(
    datasets: Mapping[str, Dataset],
    ratios: Mapping[str, float],
    seed: int,
    where: str,
    source_column: bool = False,
    limit: int | None = None,
) -> Dataset:
    """A shuffled mixture with exactly the given ratios, as many rows as there are without using one twice.

    N = min over the sets of floor(rows / weight), the weights normalised to 1; the counts add up to N by largest
    remainder (ties: the earlier name); with `limit`, N is at most that. Which rows are taken and their
    order depend on `seed` only.

    Raises:
        ConfigError: names and ratios differ, a ratio is no positive number, a set would give no row, or the columns
            (names and types) are not the same everywhere.
    """
    _check_ratios(datasets, ratios, where)
    counts = mixing_counts({name: len(dataset) for name, dataset in datasets.items()}, ratios, limit)
    for name, count in counts.items():
        if count == 0:
            message = (
                f"with ratio {ratios[name]!r} no row of it ends up among the {sum(counts.values())} of the mixture; "
                "raise its ratio, drop it, or give the other sets more rows"
            )
            raise ConfigError([Problem(f"{where}.{name}", message)])
    if source_column and any("source" in dataset.column_names for dataset in datasets.values()):
        raise ConfigError(
            [Problem(where, "the data already has a column 'source'; rename it with columns:, or drop it")]
        )
    features = _common_features(datasets, where)
    parts = []
    for index, (name, dataset) in enumerate(datasets.items()):
        rows = np.random.default_rng([seed, index]).permutation(len(dataset))[: counts[name]]
        part = _with_features(dataset.select(rows), features)
        parts.append(part.add_column("source", [name] * len(part)) if source_column else part)
    return shuffled(concatenate_datasets(parts), seed)


def take(dataset: Dataset, n: int, seed: int | None) -> Dataset:
    """At most n rows: the first ones (`seed` None), or a seeded draw without replacement."""
    chosen = dataset if seed is None else shuffled(dataset, seed)
    return chosen.select(range(min(n, len(dataset))))


def shuffled(dataset: Dataset, seed: int) -> Dataset:
    """The rows in the order that `Dataset.shuffle(seed)` gives; nothing is written to a cache."""
    return dataset.shuffle(seed=seed, keep_in_memory=True)


def check_columns(dataset: Dataset, wanted: Sequence[Sequence[str]], where: str) -> None:
    """Refuse data that has none of the wanted sets of columns, or a null in one of them.

    Raises:
        StageError: names what was found, what would do and, for a null, the row.
    """
    found = dataset.column_names
    message = missing_columns(found, wanted)
    if message is not None:
        raise StageError(f"{where}: {message}")
    names = next((names for names in wanted if set(names) <= set(found)), ())
    for name in names:
        if dataset.data.column(name).null_count:  # may be in rows that are not selected
            row = next((row for row, value in enumerate(dataset[name]) if value is None), None)
            if row is not None:
                raise StageError(f"{where}: row {row + 1} has no {name!r} (null); fill it or remove the row")
    label = dataset.features.get("label")
    if "label" in names and isinstance(label, Value) and label.dtype in ("string", "large_string"):
        raise StageError(
            f"{where}: column 'label' holds text ({dataset[0]['label']!r}), and any text would count as true; "
            "give true or false (CSV cannot: use .jsonl or .parquet)"
        )


def fingerprint(dataset: Dataset) -> str:
    """The sha256 of column names, types and every row in order: equal content gives an equal fingerprint.

    `Dataset._fingerprint` will not do: it is random after a `map` with a function that cannot be hashed.
    """
    digest = hashlib.sha256(repr(sorted(dataset.features.items())).encode())
    for row in dataset.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _load_named(
    text: str,
    where: str,
    split: str | None,
    columns: Mapping[str, str],
    stage_datasets: Callable[[str, str], Path] | None,
) -> Dataset:
    source = parse_data(text)
    if source.kind == "hub":
        return _from_hub(source, split, where)
    if source.kind == "stage":
        if stage_datasets is None:
            raise ConfigError([Problem(where, f"{text!r} can only be read inside a pipeline; give the file's path")])
        path = stage_datasets(source.stage or "", source.dataset or "")
        source = parse_data(str(path.absolute()))
    problems = problems_of_data(source, where, columns=columns)
    if problems:
        raise ConfigError(problems)
    path = source.path or Path(text)
    if path.is_dir():
        return _saved(path, split, where)
    if split is not None:
        raise ConfigError([Problem(where, f"split {split!r} needs a hub dataset; the file {path} has no splits")])
    return _from_parquet(path, where) if path.suffix.lower() == ".parquet" else _from_rows(path, where)


def _from_rows(path: Path, where: str) -> Dataset:
    unit = "row" if path.suffix.lower() == ".json" else "line"
    shape = _Shape()
    rows: list[Row] = []
    for number, row in rows_of(path, where):
        if rows and row.keys() != rows[0].keys():
            differing = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise StageError(
                f"{where}: {path}, {unit} {number}: columns {', '.join(row) or '(none)'} differ from the first row's "
                f"{', '.join(rows[0])} ({differing}); every row needs the same columns, null where there is no value"
            )
        shape.add(row, f"{unit} {number}")
        rows.append(row)
    if not rows:
        return Dataset.from_dict({})
    features = {name: _feature(column, f"{where}: {path}: column {name!r}") for name, column in shape.keys.items()}
    return Dataset.from_list(rows, features=Features(features))


@dataclass
class _Shape:
    """What kinds of values stand in one place of all rows, and where each was seen first."""

    kinds: dict[str, str] = field(default_factory=dict)
    keys: "dict[str, _Shape]" = field(default_factory=dict)
    items: "_Shape | None" = None
    objects: int = 0
    uneven: bool = False
    big: str | None = None

    def add(self, value: Any, place: str) -> None:
        """Take in one more value."""
        self.kinds.setdefault(type(value).__name__, place)
        if isinstance(value, dict):
            self.uneven |= self.objects > 0 and value.keys() != self.keys.keys()
            self.objects += 1
            for key, inner in value.items():
                self.keys.setdefault(key, _Shape()).add(inner, place)
        elif isinstance(value, list):
            self.items = self.items or _Shape()
            for inner in value:
                self.items.add(inner, place)
        elif isinstance(value, int) and abs(value) > _EXACT_FLOAT:
            self.big = self.big or place


def _feature(shape: _Shape, place: str, nested: bool = False) -> Any:
    """The feature of a column. Objects with differing keys become `Json`: Arrow would fill the gaps with null."""
    kinds = {kind: first for kind, first in shape.kinds.items() if kind != "NoneType"}
    if kinds.keys() == {"int", "float"} and shape.big is None:
        return Value("float64")
    if len(kinds) > 1:
        if nested:
            return Json()
        seen = " and ".join(f"{kind} ({first})" for kind, first in kinds.items())
        raise StageError(f"{place} holds {seen}; a column has one type: write all values alike")
    kind = next(iter(kinds), "NoneType")
    if kind == "dict":
        if shape.uneven or not shape.keys:
            return Json()
        return {name: _feature(inner, place, True) for name, inner in shape.keys.items()}
    if kind == "list":
        return List(_feature(shape.items or _Shape(), place, True))
    return Value({"str": "string", "int": "int64", "float": "float64", "bool": "bool", "NoneType": "null"}[kind])


def _from_parquet(path: Path, where: str) -> Dataset:
    try:
        return Dataset(pq.read_table(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(f"{where}: {path} cannot be read as Parquet: {error}") from error


def _saved(path: Path, split: str | None, where: str) -> Dataset:
    size = sum(file.stat().st_size for file in path.rglob("*.arrow"))
    try:
        saved = load_from_disk(str(path), keep_in_memory=size <= _IN_MEMORY_BYTES)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise StageError(f"{where}: {path} cannot be read as a saved data set: {error}; save it again") from error
    return _one_split(saved, split, where, str(path))


def _from_hub(source: DataSource, split: str | None, where: str) -> Dataset:
    try:
        loaded = load_dataset(source.repo, source.config, split=split, revision=source.revision)
    except (DatasetsError, OSError, ValueError) as error:
        raise StageError(
            f"{where}: {source.text!r} (split {split!r}) could not be loaded from the hub: {error}. "
            "Check the name (owner/name, owner/name:config, owner/name@revision), the split and the network"
        ) from error
    return loaded if isinstance(loaded, Dataset) else _one_split(loaded, None, where, source.text)


def _live(source: object, where: str, split: str | None) -> Dataset:
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        raise ConfigError(
            [Problem(where, "a streaming dataset has no length; give a Dataset (Dataset.from_list(...))")]
        )
    if isinstance(source, (Dataset, DatasetDict)):
        return _one_split(source, split, where, "the dataset")
    if not isinstance(source, Mapping):
        raise ConfigError([Problem(where, f"{type(source).__name__} is no data; give a name, a Dataset or columns")])
    if any(not isinstance(values, (list, tuple)) for values in source.values()):
        raise ConfigError([Problem(where, "several named data sets need data_mixing_ratios, one for each name")])
    try:
        return Dataset.from_dict({name: list(values) for name, values in source.items()})
    except (pa.ArrowInvalid, ValueError) as error:
        raise ConfigError([Problem(where, f"the columns do not make a table: {error}")]) from error


def _one_split(saved: Dataset | DatasetDict, split: str | None, where: str, shown: str) -> Dataset:
    if isinstance(saved, Dataset):
        if split is not None:
            raise ConfigError([Problem(where, f"split {split!r}: {shown} has no splits; leave it out")])
        return saved
    if split is None and len(saved) == 1:
        return next(iter(saved.values()))
    if split is None or split not in saved:
        given = "no split is given" if split is None else f"it has no split {split!r}"
        raise ConfigError([Problem(where, f"{shown}: {given}; choose one with split: {', '.join(saved)}")])
    return saved[split]


def _renamed(dataset: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    try:
        names = renamed_columns(dataset.column_names, columns)
    except ConfigError as error:
        raise ConfigError([Problem(where, str(error))]) from error
    return dataset.rename_columns(dict(zip(dataset.column_names, names, strict=True)))


def _check_ratios(datasets: Mapping[str, Dataset], ratios: Mapping[str, float], where: str) -> None:
    problems = [Problem(f"{where}.{name}", "has no data set of that name") for name in ratios if name not in datasets]
    problems += [Problem(f"{where}.{name}", "the data set has no ratio") for name in datasets if name not in ratios]
    for name, ratio in ratios.items():
        if isinstance(ratio, bool) or not math.isfinite(ratio) or ratio <= 0:
            problems.append(
                Problem(f"{where}.{name}", f"{ratio!r} is no ratio; give a number above 0, or drop the set")
            )
    if problems or not datasets:
        raise ConfigError(problems or [Problem(where, "there are no data sets to mix")])


def _common_features(datasets: Mapping[str, Dataset], where: str) -> Features:
    first, *others = datasets
    common: Any = dict(datasets[first].features)
    problems = []
    for name in others:
        features = datasets[name].features
        for column in [*common, *(column for column in features if column not in common)]:
            ours, theirs = common.get(column), features.get(column)
            unified = None if ours is None or theirs is None else _unified(ours, theirs)
            if unified is None:
                told = f"{first}: {_type(ours)}, {name}: {_type(theirs)}"
                problems.append(Problem(where, f"column {column!r} differs ({told}); rename, drop or convert it"))
            else:
                common[column] = unified
    if problems:
        raise ConfigError(problems)
    return Features(common)


def _type(feature: Any) -> str:
    return "missing" if feature is None else str(feature)


def _unified(ours: Any, theirs: Any) -> Any:
    """One feature that both fit without a change of value, or None."""
    if ours == theirs:
        return ours
    if isinstance(ours, Value) and isinstance(theirs, Value):
        return Value("string") if {ours.dtype, theirs.dtype} == {"string", "large_string"} else None
    nested = (Json, List, LargeList, dict)
    if (
        isinstance(ours, nested)
        and isinstance(theirs, nested)
        and (isinstance(ours, Json) or isinstance(theirs, Json))
    ):
        return Json()
    if isinstance(ours, (List, LargeList)) and isinstance(theirs, (List, LargeList)):
        inner = _unified(ours.feature, theirs.feature)
        return None if inner is None else List(inner)
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        fields = {key: _unified(ours[key], theirs[key]) for key in ours}
        return None if any(value is None for value in fields.values()) else fields
    return None


def _with_features(dataset: Dataset, features: Features) -> Dataset:
    ordered = dataset.select_columns(list(features))
    return ordered if ordered.features == features else Dataset.from_list(ordered.to_list(), features=features)


def _shown(source: object) -> str:
    return repr(source) if isinstance(source, str) else "the dataset"
