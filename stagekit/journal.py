"""The journal: an append-only JSONL file that makes generation resumable and auditable.

    {"type": "meta", "format": 1, "digest": "...", "info": {"model": "...", "tokenizer": "...", "versions": {...}}}
    {"type": "record", "batch": "b0", "record": {"key": "k0", ...}}
    {"type": "record", "batch": "b0", "record": {"key": "k1", ...}}
    {"type": "batch", "batch": "b0", "records": 2, "time": 1764000000.0}

A batch counts once its `batch` line is there. What a crash left after the last such line is cut off on opening, so
that a batch is either whole or made again. The time of a record is that of its batch: records hold nothing that
differs between a run that was killed and one that was not.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from stagekit.errors import StageError


FORMAT = 1

TEXTS = ("instructions.jsonl", "journal.jsonl", "judgements.jsonl", "validation.jsonl")
"""The journals of texts that a stage's folder may have: the instructions that synthetic data begin with, the texts of
all other kinds, what a judge says of them, and the answers to validation data."""

PROMPTS = "prompts.jsonl"
"""Beside them: what was asked, by the `prompt_id` of the records."""

JOURNALS = (*TEXTS, "scores.jsonl")
"""And the rewards of the texts. What they hold is used again where a stage of other settings would write the same."""

Record = Mapping[str, Any]

_HEAD = b'{"type": "meta"'


class Journal:
    """Records of finished batches, by key and in the file's order: `Journal.open` to write, `Journal.read` to look,
    `Journal.follow` beside a process that writes."""

    def __init__(self, path: Path, digest: str) -> None:
        """An empty journal without a file; `open` and `read` fill it. An empty `digest` takes that of the file."""
        self.path = path
        self.digest = digest
        self.info: dict[str, Any] = {}
        self.cut_bytes = 0
        self._records: dict[str, Record] = {}
        self._batches: dict[str, float] = {}
        self._file: BinaryIO | None = None
        self._follows = False

    @classmethod
    def open(cls, path: str | Path, digest: str, meta: Mapping[str, Any] | None = None) -> Self:
        """Open the journal at `path`, or create it; then it goes on where it ended.

        Args:
            digest: what decides the content (settings, prompts, model). A journal with another digest is refused.
            meta: facts worth keeping beside it (model fingerprint, tokenizer hash, versions). Written on creation
                only; `info` is what the file holds.

        Raises:
            StageError: the file has another digest, another format, or a damaged line that no crash explains.
        """
        journal = cls(Path(path), digest)
        journal.path.parent.mkdir(parents=True, exist_ok=True)
        data = journal.path.read_bytes() if journal.path.exists() else b""
        if data and not _starts_as_journal(data):
            raise StageError(f"{path} is no journal; nothing was changed. Move it away or choose another path.")
        good = journal._load(data)
        journal.cut_bytes = len(data) - good
        if journal.cut_bytes:
            os.truncate(journal.path, good)
        journal._file = journal.path.open("ab")
        if good == 0:
            journal.info = dict(meta or {})
            journal._write([{"type": "meta", "format": FORMAT, "digest": digest, "info": journal.info}])
        return journal

    @classmethod
    def follow(cls, path: str | Path, digest: str) -> Self:
        """What `open` gave in another process, which writes the file: what is appended here is only remembered.

        Raises:
            StageError: as `open`.
        """
        journal = cls(Path(path), digest)
        journal._load(journal.path.read_bytes())
        journal._follows = True
        return journal

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The finished batches of the journal at `path`, whatever its digest; the file is not touched.

        Raises:
            StageError: there is no journal, or it is damaged.
        """
        journal = cls(Path(path), "")
        data = journal.path.read_bytes() if journal.path.exists() else b""
        if not _starts_as_journal(data) or not journal._load(data):
            raise StageError(f"there is no journal at {path}")
        return journal

    def get(self, key: str) -> Record | None:
        """The record under `key`, or None where no finished batch holds one."""
        return self._records.get(key)

    def has_batch(self, batch_id: str) -> bool:
        """Whether the batch is there, whole."""
        return batch_id in self._batches

    def batch_times(self) -> dict[str, float]:
        """When each batch was written, in seconds since 1970, in the order of the file."""
        return dict(self._batches)

    def append_batch(self, batch_id: str, records: Sequence[Record]) -> None:
        """Write a batch of records, each with a new `key`: one write, synced to disk before the call returns."""
        assert batch_id not in self._batches, f"batch {batch_id!r} is in the journal already"
        keys = [record["key"] for record in records]
        assert len({*keys} - self._records.keys()) == len(keys), f"batch {batch_id!r} repeats a key of the journal"
        now = round(time.time(), 3)
        lines: list[Mapping[str, Any]] = [{"type": "record", "batch": batch_id, "record": dict(r)} for r in records]
        self._write([*lines, {"type": "batch", "batch": batch_id, "records": len(records), "time": now}])
        self._records.update(zip(keys, records, strict=True))
        self._batches[batch_id] = now

    def close(self) -> None:
        """Close the file. What was appended is on disk already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __iter__(self) -> Iterator[Record]:
        """The records, in the order of the file."""
        return iter(self._records.values())

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        """Whether a finished batch holds a record under `key`."""
        return key in self._records

    def __enter__(self) -> Self:
        """The journal itself; leaving closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self._follows:
            return
        assert self._file is not None, f"the journal {self.path} is closed"
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._file.write(text.encode("utf-8", "surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _load(self, data: bytes) -> int:
        """Read `data`; returns how many bytes, from the start, belong to the meta line and to whole batches."""
        position = good = 0
        open_records: list[tuple[str, Record]] = []
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            position += len(line)
            entry = self._parse(line, number, is_last=position == len(data))
            if entry is None:
                break
            if number == 1:
                self._accept_meta(entry)
                good = position
            elif entry.get("type") == "record":
                open_records.append((entry["batch"], entry["record"]))
            elif entry.get("type") == "batch":
                self._accept_batch(entry, open_records, number)
                open_records, good = [], position
            else:
                raise self._damaged(number, f"a line of type {entry.get('type')!r}")
        return good

    def _parse(self, line: bytes, number: int, is_last: bool) -> dict[str, Any] | None:
        """The line as an object; None for a torn last line."""
        if not line.endswith(b"\n"):
            return None
        try:
            entry = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            if is_last:
                return None
            raise self._damaged(number, f"no valid JSON ({error})") from error
        if not isinstance(entry, dict):
            raise self._damaged(number, "no JSON object")
        return entry

    def _accept_meta(self, entry: Mapping[str, Any]) -> None:
        if entry.get("format") != FORMAT:
            raise StageError(
                f"{self.path}: the journal has format {entry.get('format')!r}, this stagekit writes {FORMAT}. "
                "Go on with the version that wrote it, or delete the file to generate anew."
            )
        self.digest = self.digest or entry["digest"]
        if entry["digest"] != self.digest:
            raise StageError(
                f"{self.path}: the journal was made under digest {entry['digest'][:12]}, this run has "
                f"{self.digest[:12]}: the settings, the prompts or the model changed since. Going on would mix the "
                "two. Undo the change to go on, or delete the file (or choose another output_dir) to generate anew."
            )
        self.info = dict(entry.get("info", {}))

    def _accept_batch(self, entry: Mapping[str, Any], open_records: Sequence[tuple[str, Record]], number: int) -> None:
        batch_id = entry["batch"]
        if len(open_records) != entry["records"] or any(owner != batch_id for owner, _ in open_records):
            raise self._damaged(number, f"batch {batch_id!r} closes with other records than it announces")
        for _, record in open_records:
            if record["key"] in self._records:
                raise self._damaged(number, f"a second record with key {record['key']!r}")
            self._records[record["key"]] = record
        self._batches[batch_id] = entry["time"]

    def _damaged(self, number: int, what: str) -> StageError:
        return StageError(
            f"{self.path}: line {number} is damaged: {what}. A crash damages only the last line, so the file was "
            f"changed by hand or by the disk. Delete line {number} and all after it to go on from there."
        )


def _starts_as_journal(data: bytes) -> bool:
    """Whether `data` can be what a crash left of a journal: a foreign file must never be cut."""
    return data.startswith(_HEAD) or _HEAD.startswith(data)
