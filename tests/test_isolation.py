"""Stages in processes of their own: signals, deaths, the lock, and what is there afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import child, children
from stagekit.errors import RunLocked
from stagekit.files import lock
from stagekit.stopping import Stop, stop_on_signals
from tests.running import lines, run, same, stage


Write = Callable[..., Path]
ROOT = Path(__file__).resolve().parent.parent


class Parent:
    """A process that runs a pipeline file with each stage in a child."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.isolated", str(file), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ASKED": str(folder / "asked.jsonl")}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Wait for something to be so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)

    def logged(self, name: str, count: int) -> Callable[[], bool]:
        """Whether a file of the first stage has `count` lines."""

        def look() -> bool:
            path = self.folder / name
            return path.exists() and len(path.read_text().splitlines()) >= count

        return look

    def end(self) -> tuple[int, str]:
        out, error = self.process.communicate(timeout=300)
        assert "Fatal Python error" not in error
        return self.process.returncode, out

    def child(self) -> int:
        """The process of the stage."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(text.split()[0])


def finish(file: Path, folder: Path) -> None:
    code, out = Parent(file, folder).end()
    assert code == 0, out


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def nothing(model: Any, dataset: Any) -> dict[str, float]:
    return {}


def steps(folder: Path) -> int:
    """How many steps are in the log."""
    path = folder / "01-s/metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def test_signals_and_deaths_one_after_the_other_end_in_the_same_bits(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    """Ctrl-C; then the child is killed; then the parent is killed and the child stops by itself; then it finishes."""
    rows, folder, file = str(write_rows(sft_rows)), tmp_path / "run", tmp_path / "run.yaml"
    common: dict[str, Any] = {
        "evaluation_steps": 1, "validation_data": rows, "early_stopping": None, "max_steps": 20,
        "checkpoint_save_epochs": 0,
    }  # fmt: skip
    whole = run(
        tiny_model_path, tmp_path / "whole", stage("s", rows, custom_evaluation_function=nothing, **common)
    ).policy
    declared = stage("s", rows, custom_evaluation_function="tests.isolated:slow", **common).only_set()
    plain = {"name": "r", "model": tiny_model_path, "output_dir": str(folder), "stages": [declared]}
    file.write_text(yaml.safe_dump(plain))

    parent = Parent(file, folder)  # Ctrl-C
    parent.until(lambda: steps(folder) >= 2)
    with pytest.raises(RunLocked), lock(folder):
        pass
    parent.process.send_signal(signal.SIGINT)
    code, out = parent.end()
    assert code == 130, out
    assert "Run the same command again" in out
    result = json.loads((folder / "01-s/result.json").read_text())
    assert (result["status"], result["reason"]) == ("stopped", "interrupted")
    stopped_at = max(int(path.parent.name[11:]) for path in folder.glob("01-s/checkpoints/*/complete"))
    assert stopped_at == steps(folder) < 20

    parent = Parent(file, folder)  # the child is killed
    parent.until(lambda: steps(folder) >= stopped_at + 4)
    os.kill(parent.child(), signal.SIGKILL)
    code, out = parent.end()
    assert code == 1, out
    assert "StageError: stage 's': its process was killed (signal 9), which is what the system does when memory" in out
    assert json.loads((folder / "01-s/result.json").read_text())["status"] == "failed"

    before = steps(folder)
    parent = Parent(file, folder)  # the parent is killed
    parent.until(lambda: steps(folder) >= before + 1)
    child = parent.child()
    parent.process.send_signal(signal.SIGKILL)
    parent.process.wait()
    with pytest.raises(RunLocked), lock(folder):
        pass
    parent.until(lambda: not _alive(child), 60)
    assert json.loads((folder / "01-s/result.json").read_text())["reason"] == "interrupted"
    assert steps(folder) < 20

    finish(file, folder)
    assert same(folder / "01-s/policy", str(whole))
    assert [line["step"] for line in lines(folder / "01-s") if "loss" in line] == list(range(1, 21))


@pytest.mark.slow
def test_texts_are_generated_once_but_for_the_batch_under_way(
    write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    prompts = [{"prompt": f"Name {number} fruits."} for number in range(12)]
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    only = {
        "name": "c", "method": {"type": "constitutional", "rounds": 1}, "training_data": str(write_rows(prompts)),
        "generation": {"backend": "tests.isolated:reply", "max_new_tokens": 8, "batch_tokens": 60}, "max_steps": 1,
    }  # fmt: skip
    plain = {"name": "r", "model": tiny_model_path, "output_dir": str(folder), "stages": [only]}
    file.write_text(yaml.safe_dump(plain))
    for count, number, expected in ((8, signal.SIGTERM, 130), (20, signal.SIGKILL, 1)):
        parent = Parent(file, folder)
        parent.until(parent.logged("asked.jsonl", count))
        os.kill(parent.child(), number)
        code, out = parent.end()
        assert code == expected, out
        asked = (folder / "asked.jsonl").read_text().splitlines()
        assert len(asked) < 36
        if number == signal.SIGTERM:
            assert len(asked) == len(set(asked))
    finish(file, folder)
    asked = (folder / "asked.jsonl").read_text().splitlines()
    assert len(set(asked)) == 36
    assert len(asked) - len(set(asked)) <= 2 * 3  # at each end, the batch under way: a prompt's three texts


def test_a_stage_that_is_switched_off_is_no_model_for_the_next_child(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's own code, in this process: what it takes for the results before it."""
    rows, folder = str(write_rows(sft_rows)), tmp_path / "run"
    options: dict[str, Any] = {"max_steps": 1, "warmup_ratio": 0}
    run(tiny_model_path, folder, stage("a", rows, **options), stage("b", rows, **options))
    run(tiny_model_path, folder, stage("a", rows, enabled=False), stage("b", rows, **options))
    monkeypatch.setattr(child, "_stop_with_parent", lambda stop: None)
    assert child.main([str(folder), "1", "-"]) == 0
    alone = run(tiny_model_path, tmp_path / "alone", stage("b", rows, **options))
    assert same(folder / "02-b/policy", str(alone.policy))


def test_a_failure_in_a_child_is_told_by_the_parent(tmp_path: Path) -> None:
    only = {"name": "s", "method": {"type": "custom", "function": "json:loads"}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"name": "r", "output_dir": str(tmp_path / "run"), "stages": [only]}))
    code, out = Parent(file, tmp_path / "run").end()
    assert code == 1
    assert "StageError: stage 's': TypeError: the JSON object must be" in out
    assert "in loads" in (tmp_path / "run/01-s/error.txt").read_text()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (-signal.SIGKILL, "killed (signal 9), which is what the system does when memory runs out"),
        (-signal.SIGSEGV, "its process died of SIGSEGV"),
        (7, "its process ended with code 7 and left no result"),
    ],
)
def test_a_death_is_told_by_its_cause(code: int, expected: str) -> None:
    assert expected in children._death(code)


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(Stop()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_ctrl_c_asks_and_the_second_ends_at_once() -> None:
    stop = Stop()
    with stop_on_signals(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_parent_imports_no_torch() -> None:
    code = "import sys; import stagekit.walk, stagekit.children; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture(autouse=True)
def _no_children_left() -> Iterator[None]:
    yield
    pattern = "stagekit.child"
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        assert not (pattern in words and parent == os.getpid()), "a child of this test is still there"
