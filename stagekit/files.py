"""Files that are whole or not there: write to a temporary one, fsync, rename. And the lock of a run folder."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stagekit.errors import ConfigError, RunLocked, StageError


FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def write_text(path: Path, text: str) -> None:
    """Write a file, all or nothing.

    Raises:
        StageError: the disk is full, or a file-size limit is reached; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StageError(cannot_write(path, error)) from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        StageError: the disk is full, or cannot be written.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for left_by_a_crash in (temporary, old):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_files(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or is_full(error):
            raise StageError(cannot_write(path, error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync_files(folder: Path) -> dict[str, int]:
    """Wait until every file below `folder` has reached the disk; gives their sizes by relative name."""
    sizes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            _sync(file)
            sizes[str(file.relative_to(folder))] = file.stat().st_size
    return sizes


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: BaseException) -> str:
    """What to say of a failed write, with the way out."""
    text = str(getattr(error, "strerror", None) or error)
    if is_full(error):
        return f"{path}: cannot be written: {text}; make room (or raise the limit) and run the same command again"
    return f"{path}: cannot be written: {text}"


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; safetensors and torch.save say so only in their text."""
    text = str(error)
    said = ("File too large", "No space left", "Disk quota", "inline_container.cc", "PytorchStreamWriter")
    return getattr(error, "errno", None) in FULL or any(word in text for word in said)


def make_folder(path: Path) -> None:
    """Make the run folder, and see that it can be written to.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        problem = str(error.strerror or error).lower()
        raise ConfigError(f"output_dir: {path}: cannot be written to: {problem}; choose another output_dir") from error


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[IO[str]]:
    """Hold the run folder. The lock belongs to the open file: a child that inherits that holds it too.

    Raises:
        RunLocked: another process holds it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunLocked(
                f"{folder}: {owner} is working in this run folder; wait for it, or choose another output_dir"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        yield file
