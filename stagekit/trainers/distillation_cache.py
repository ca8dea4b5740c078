"""What a teacher says of a data set, kept on disk: the K likeliest next tokens, and the mass of all others.

Legend: N tokens that predict a label, V vocabulary, K tokens kept at each.
"""

import bisect
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from stagekit.distillation_losses import bucketed
from stagekit.errors import ConfigError, StageError
from stagekit.files import whole_folder
from stagekit.sources import fingerprint_of_path


COLUMN = "teacher_row"
"""The column of a data set that says which row of the cache is its."""

SHARD_TOKENS = 1 << 17
"""Tokens of one file, about: what is in memory while the cache is written."""

_INDEX = "index.json"


@dataclass(frozen=True)
class Targets:
    """A teacher's distributions at N tokens. Without `ids` they are over the whole vocabulary, in its order."""

    ids: torch.Tensor | None
    """(N, K) int64, which tokens."""
    logps: torch.Tensor
    """(N, K+1) float32 with the mass of all others last, or (N, V)."""

    def at(self, rows: slice, device: torch.device) -> "Targets":
        """Those of some of the tokens."""
        ids = None if self.ids is None else self.ids[rows].to(device)
        return Targets(ids, self.logps[rows].to(device))


def top_k(logps: torch.Tensor, k: int) -> Targets:
    """The K likeliest tokens of (N, V) log-probabilities; all of them, in their order, where K is V or more."""
    if k >= logps.shape[-1]:
        return Targets(None, logps)
    ids = logps.topk(k, dim=-1).indices
    return Targets(ids, bucketed(logps, ids))


class TeacherCache:
    """A cache on disk, mapped into memory and read row by row.

    At K = 64 a token takes 388 bytes for a vocabulary of up to 65,536 and 452 for a larger one: float32
    log-probabilities, and ids in two or three bytes.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self._folder, self._index = folder, index
        self._first = [shard["first_row"] for shard in index["shards"]]
        self._open: dict[int, dict[str, torch.Tensor]] = {}
        self.rows: int = index["rows"]

    def read(self, rows: Iterable[int]) -> Targets:
        """The distributions of some rows, one row after the other."""
        found = [self._row(row) for row in rows]
        ids = [one.ids for one in found if one.ids is not None]
        return Targets(torch.cat(ids) if ids else None, torch.cat([one.logps for one in found]))

    def _row(self, row: int) -> Targets:
        number = bisect.bisect_right(self._first, row) - 1
        if number not in self._open:
            self._open[number] = load_file(self._folder / self._index["shards"][number]["file"])
        shard, local = self._open[number], row - self._first[number]
        start, end = shard["offsets"][local : local + 2].tolist()
        logps = shard["logps"][start:end]
        if "low" not in shard:
            return Targets(None, logps)
        ids = shard["low"][start:end].long()
        if "high" in shard:
            ids = ids + (shard["high"][start:end].long() << 16)
        return Targets(ids, logps)


class KeptTargets:
    """What a teacher says of several data sets, whose rows are numbered through.

    Args:
        folder: Where the caches are; made if missing.
        settings: What the answers depend on beside the data, as JSON can hold it.
        ask: Gives the teacher's answers of every row of a data set, in order; called where there is no cache.
        vocabulary: V.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        ask: Callable[[Dataset], Iterable[Targets]],
        vocabulary: int,
    ) -> None:
        self._folder, self._settings, self._ask, self._vocabulary = folder, settings, ask, vocabulary
        self._caches: list[TeacherCache] = []

    def add(self, dataset: Any, name: str) -> Dataset:
        """The data set with a column that numbers its rows, once the answers are on disk.

        Raises:
            ConfigError: its rows have no number.
        """
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"teacher_cache: the {name} data is a {type(dataset).__name__}, whose rows have no number; load it as "
                "a Dataset, or leave the cache out"
            )
        key = {"tokens": tokens_digest(dataset), **self._settings}
        cache = open_cache(self._folder, key)
        if cache is None:
            cache = write_cache(self._folder, key, self._ask(dataset), self._vocabulary)
        first = sum(one.rows for one in self._caches)
        self._caches.append(cache)
        return dataset.add_column(COLUMN, list(range(first, first + len(dataset))))

    def read(self, rows: Sequence[int]) -> Targets:
        """What was kept of rows of one of the data sets."""
        first = 0
        for cache in self._caches:
            if rows[0] < first + cache.rows:
                return cache.read(row - first for row in rows)
            first += cache.rows
        raise StageError(f"teacher_cache: there is no row {rows[0]}; the data are others than when it was written")


def open_cache(parent: Path, key: Mapping[str, Any]) -> TeacherCache | None:
    """The cache of that key; None where there is none that can be used. Every file of it is hashed once."""
    folder, text = _place(parent, key)
    if not folder.is_dir():
        return None
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        whole = (
            index["sha256"] == _checksum(index)
            and index["key"] == text
            and all(fingerprint_of_path(folder / shard["file"]) == shard["sha256"] for shard in index["shards"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{folder} cannot be read ({error}); the teacher is asked again", stacklevel=2)
        return None
    if not whole:
        warnings.warn(f"{folder} is damaged: a checksum is wrong; the teacher is asked again", stacklevel=2)
        return None
    return TeacherCache(folder, index)


def _checksum(index: Mapping[str, Any]) -> str:
    """Of the index itself, which says where each row stands."""
    content = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_cache(parent: Path, key: Mapping[str, Any], rows: Iterable[Targets], vocabulary: int) -> TeacherCache:
    """Write what the teacher says of every row, in order; the folder appears whole or not at all."""
    folder, text = _place(parent, key)
    parent.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    count = 0
    own = folder.with_name(f"{folder.name}.{os.getpid()}")  # another run may be writing the same one
    with whole_folder(own) as temporary:
        for shard in _shards(rows):
            file = temporary / f"{len(shards):05d}.safetensors"
            save_file(_tensors(shard, vocabulary), file)
            shards.append({"file": file.name, "first_row": count, "sha256": fingerprint_of_path(file)})
            count += len(shard)
        index: dict[str, Any] = {"key": text, "rows": count, "shards": shards}
        index["sha256"] = _checksum(index)
        (temporary / _INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    own.rename(folder)
    return TeacherCache(folder, index)


def tokens_digest(dataset: Dataset) -> str:
    """A sha256 over token ids, labels and where packed rows begin: what the teacher is asked about."""
    digest = hashlib.sha256()
    names = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            lists = table.column(name).combine_chunks()
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update(lists.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class WithRows:
    """A collator that also tells which rows of the cache the batch has, (B,); where its rows say so."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, and `teacher_row` in it."""
        numbers = [row[COLUMN] for row in rows if COLUMN in row]
        batch = self.collate([{name: value for name, value in row.items() if name != COLUMN} for row in rows])
        return {**batch, COLUMN: torch.tensor(numbers)} if numbers else batch


def by_row(targets: Targets, rows: list[Any], labels: torch.Tensor) -> Iterator[Targets]:
    """The targets of a batch, row by row. Where the collator puts all rows into one (padding-free), their lengths
    tell them apart."""
    counted = labels[:, 1:] != -100
    if len(labels) == len(rows):
        lengths = counted.sum(dim=1).tolist()
    else:
        ends = torch.tensor([len(row["input_ids"]) for row in rows]).cumsum(0) - 1
        lengths = [int(part.sum()) for part in counted[0].tensor_split(ends[:-1].tolist())]
    start = 0
    for length in lengths:
        yield targets.at(slice(start, start + length), torch.device("cpu"))
        start += length


def _place(parent: Path, key: Mapping[str, Any]) -> tuple[Path, str]:
    text = json.dumps(key, sort_keys=True)
    return parent / f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:32]}", text


def _shards(rows: Iterable[Targets]) -> Iterator[list[Targets]]:
    shard: list[Targets] = []
    tokens = 0
    for row in rows:
        shard.append(row)
        tokens += len(row.logps)
        if tokens >= SHARD_TOKENS:
            yield shard
            shard, tokens = [], 0
    if shard:
        yield shard


def _tensors(rows: Sequence[Targets], vocabulary: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, *(len(row.logps) for row in rows)])
    found = {"offsets": lengths.cumsum(0), "logps": torch.cat([row.logps for row in rows]).float().cpu()}
    ids = [row.ids for row in rows if row.ids is not None]
    if ids:
        whole = torch.cat(ids).cpu()
        found["low"] = (whole & 0xFFFF).to(torch.uint16)
        if vocabulary > 1 << 16:
            found["high"] = (whole >> 16).to(torch.uint8)
    return found
