"""The journal keeps whole batches, drops what a crash left, and refuses what is not its own."""

import json
import os
from pathlib import Path

import pytest

from stagekit.errors import StageError
from stagekit.journal import Journal


def record(key: str, text: str = "text") -> dict[str, str]:
    return {"key": key, "text": text}


def two_batches(path: Path) -> bytes:
    with Journal.open(path, "digest", {"model": "tiny"}) as journal:
        journal.append_batch("b0", [record("k0"), record("k1", 'naïve "quoted"\r\n\u2028\x85')])
        journal.append_batch("b1", [record("k2")])
    return path.read_bytes()


def test_records_come_back_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    two_batches(path)
    with Journal.open(path, "digest") as journal:
        assert [entry["key"] for entry in journal] == ["k0", "k1", "k2"]
        assert journal.get("k1") == record("k1", 'naïve "quoted"\r\n\u2028\x85')
        assert journal.get("k3") is None
        assert "k2" in journal and "k3" not in journal and len(journal) == 3
        assert journal.has_batch("b1") and not journal.has_batch("b2")
        assert list(journal.batch_times()) == ["b0", "b1"]
        assert journal.info == {"model": "tiny"}
        assert journal.cut_bytes == 0


def test_opening_and_going_on_changes_no_byte_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    before = two_batches(path)
    with Journal.open(path, "digest", {"model": "another"}) as journal:
        assert journal.info == {"model": "tiny"}
        journal.append_batch("b2", [record("k3")])
    after = path.read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["type"] for line in after[len(before) :].splitlines()] == ["record", "batch"]


def test_a_crash_at_any_byte_leaves_the_batches_that_were_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = two_batches(path)
    lines = whole.splitlines(keepends=True)
    ends = [len(b"".join(lines[:count])) for count in (1, 4, 6)]  # after meta, b0, b1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Journal.open(path, "digest", {"model": "tiny"}) as journal:
            batches = sum(cut >= end for end in ends[1:])
            assert len(journal.batch_times()) == batches
            assert len(journal) == (0, 2, 3)[batches]
        assert path.read_bytes() == whole[: ends[batches]]


def test_an_invalid_last_line_with_its_newline_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = two_batches(path)
    path.write_bytes(whole + b'{"type": "rec\x00\x00\n')
    with Journal.open(path, "digest") as journal:
        assert len(journal) == 3
        assert journal.cut_bytes == 16
    assert path.read_bytes() == whole


def test_a_dropped_batch_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(two_batches(path)[:-5])
    with Journal.open(path, "digest") as journal:
        assert "k2" not in journal
        journal.append_batch("b1", [record("k2", "again")])
    with Journal.open(path, "digest") as journal:
        assert journal.get("k2") == record("k2", "again")


def test_an_invalid_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = two_batches(path).splitlines(keepends=True)
    damaged = b"".join([*lines[:2], b"{oops\n", *lines[3:]])
    path.write_bytes(damaged)
    with pytest.raises(StageError, match="line 3 is damaged: no valid JSON"):
        Journal.open(path, "digest")
    assert path.read_bytes() == damaged


def test_a_missing_record_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = two_batches(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(StageError, match="line 3 is damaged: batch 'b0' closes with other records"):
        Journal.open(path, "digest")


def test_another_digest_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = two_batches(path)
    with pytest.raises(StageError, match=r"made under digest digest, this run has other.* or delete the file"):
        Journal.open(path, "other")
    assert path.read_bytes() == whole


def test_reading_takes_any_digest_and_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    torn = two_batches(path)[:-5]
    path.write_bytes(torn)
    journal = Journal.read(path)
    assert journal.digest == "digest" and journal.info == {"model": "tiny"}
    assert [entry["key"] for entry in journal] == ["k0", "k1"]
    assert path.read_bytes() == torn
    with pytest.raises(AssertionError, match="is closed"):
        journal.append_batch("b2", [record("k3")])
    for missing in (tmp_path / "none.jsonl", path.with_name("notes")):
        with pytest.raises(StageError, match="there is no journal at"):
            Journal.read(missing)
        path.with_name("notes").write_text("notes")


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(two_batches(path).replace(b'"format": 1', b'"format": 9', 1))
    with pytest.raises(StageError, match="has format 9"):
        Journal.open(path, "digest")


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"prompt": "x"}\n'])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(StageError, match="is no journal; nothing was changed"):
        Journal.open(path, "digest")
    assert path.read_bytes() == content


def test_a_batch_is_on_disk_before_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "journal.jsonl", list[bytes]()
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", watch)
    whole = two_batches(path)
    lines = whole.splitlines(keepends=True)
    assert synced == [b"".join(lines[:count]) for count in (1, 4, 6)]


def test_a_key_is_written_once(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.jsonl", "digest") as journal:
        journal.append_batch("b0", [record("k0")])
        with pytest.raises(AssertionError, match="repeats a key"):
            journal.append_batch("b1", [record("k0")])
        with pytest.raises(AssertionError, match="repeats a key"):
            journal.append_batch("b1", [record("k1"), record("k1")])
        with pytest.raises(AssertionError, match="is in the journal already"):
            journal.append_batch("b0", [record("k1")])


def test_a_process_that_follows_has_all_batches_and_writes_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    before = two_batches(path)
    with Journal.open(path, "digest") as writing, Journal.follow(path, "digest") as following:
        assert list(following) == list(writing) and following.info == writing.info
        following.append_batch("b2", [record("k3")])
        assert path.read_bytes() == before
        writing.append_batch("b2", [record("k3")])
        assert following.get("k3") == writing.get("k3") and following.has_batch("b2")
    with pytest.raises(StageError, match="was made under digest"):
        Journal.follow(path, "another")
