"""Files are whole or not there; a disk that is full is one clear error."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit.errors import ConfigError, RunLocked, StageError
from stagekit.files import cannot_write, lock, make_folder, sync_files, whole_folder, write_text
from tests.running import run, stage


ROOT = Path(__file__).resolve().parent.parent


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "one")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises(StageError, match="a: cannot be written: No space left on device; make room"):
            write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="halfway"), whole_folder(tmp_path / "policy") as folder:
        (folder / "weights").write_text("some")
        raise ValueError("halfway")
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with whole_folder(tmp_path / "policy") as folder:
            (folder / f"{text}.txt").write_text(text)
            assert not (tmp_path / "policy" / f"{text}.txt").exists()
        assert [path.name for path in (tmp_path / "policy").iterdir()] == [f"{text}.txt"]


def test_the_rest_of_a_dead_process_does_not_reach_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".policy.tmp").mkdir()
    (tmp_path / ".policy.tmp/torn").write_text("x")
    with whole_folder(tmp_path / "policy") as folder:
        (folder / "weights").write_text("y")
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["weights"]


def test_sizes_of_files_are_told_by_their_relative_names(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("12345")
    assert sync_files(tmp_path) == {"a/b/c": 5}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EFBIG, "File too large"), "make room"),
        (RuntimeError("SafetensorError: No space left on device (os error 28)"), "make room"),
        (OSError(errno.EACCES, "Permission denied"), "cannot be written: Permission denied"),
    ],
)
def test_a_failed_write_says_the_way_out(error: BaseException, expected: str) -> None:
    assert expected in cannot_write(Path("x"), error)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(RunLocked, match="choose another output_dir"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_a_run_folder_below_a_file_is_a_problem_of_output_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"output_dir: .*file/run: cannot be written to: not a directory; choose"):
        make_folder(tmp_path / "file/run")


def test_a_run_below_a_file_ends_before_anything_is_loaded(
    sft_rows: list[Any], write_rows: Callable[..., Path], tiny_model_path: str, tmp_path: Path
) -> None:
    rows = write_rows(sft_rows)
    with pytest.raises(ConfigError, match="output_dir"):
        run(tiny_model_path, rows / "run", stage("s", str(rows)))


LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from stagekit.errors import StageError
from tests.running import run, stage
model, rows, top = sys.argv[1:4]
size = Path(model, "model.safetensors").stat().st_size
cases = {
    "policy": (size // 2, {}),
    "checkpoint": (size // 2, {"checkpoint_save_steps": 1}),
    "optimizer": (size + size // 2, {"checkpoint_save_steps": 1}),
    "merge": (size // 2, {"lora": {"rank": 2, "merge": True}}),
}
for name, (limit, options) in cases.items():
    folder = Path(top, name)
    only = stage("s", rows, **{"max_steps": 2, "checkpoint_save_steps": 0, "checkpoint_save_epochs": 0, **options})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        run(model, folder, only)
    except StageError as error:
        print(name, "StageError:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    left = [path.name for path in folder.rglob("*")]
    print(name, "left:", [part for part in left if "policy" in part or "checkpoint-" in part])
    print(name, run(model, folder, only)["s"].status)
"""


def test_a_file_that_grows_too_large_is_one_error_and_leaves_nothing_half_written(
    sft_rows: list[Any], write_rows: Callable[..., Path], tiny_model_path: str, tmp_path: Path
) -> None:
    arguments = [tiny_model_path, str(write_rows(sft_rows)), str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    for name in ("policy", "checkpoint", "optimizer", "merge"):
        (said,) = (line for line in printed if line.startswith(f"{name} StageError: stage 's': "))
        assert said.count("cannot be written") == 1, said
        assert "make room" in said or "free some space" in said
        assert f"{name} left: []" in printed
        assert f"{name} completed" in printed
