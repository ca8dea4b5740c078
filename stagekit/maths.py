"""Whether two mathematical answers are equal, asked of math-verify in processes that can be ended.

A completion decides what is computed, so a comparison has an allowance of CPU time, which the kernel enforces; a
comparison that uses it up counts as unequal. (math-verify's own limit is an alarm, which reaches neither threads nor
arithmetic in C.) The processes stay for the next comparisons, and end with this one.
"""

import atexit
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from stagekit.errors import ConfigError, StageError
from stagekit.sandbox import cores


_CHILD = Path(__file__).with_name("maths_child.py")
_FOR_A_PROCESS = 16
"""Comparisons that are worth another process, which takes half a second to start."""


class Comparison(NamedTuple):
    """A right answer and what was said."""

    gold: str
    said: str
    whole: bool = False
    """Whether all of `said` is the answer, also without something that delimits mathematics."""
    boxed: bool = False
    """Whether only what stands in a box counts."""
    seconds: int = 5
    """CPU time that it may take."""


class Unreadable(ConfigError):
    """A right answer that is no mathematics; `gold` is the answer."""

    def __init__(self, gold: str, why: str) -> None:
        self.gold = gold
        super().__init__(f"{gold!r} {why}")


class Comparer:
    """A process that compares. It is started by the first comparison, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def equal(self, one: Comparison) -> bool:
        """Whether the two are equal; False where comparing them takes more than the allowed time or memory.

        Raises:
            Unreadable: the right answer is no mathematics, or reading it takes too long.
            StageError: math-verify does not work here.
        """
        try:
            process = self._asked(one)
        except OSError:  # somebody ended it between two comparisons
            self.end()
            process = self._asked(one)
        read = self._line(process)
        if read == "none":
            raise Unreadable(one.gold, "is read as no mathematics")
        if read != "gold":
            raise Unreadable(one.gold, f"takes more than {one.seconds} seconds to read")
        return self._line(process) == "equal"

    def _asked(self, one: Comparison) -> "subprocess.Popen[str]":
        process = self._process if self._process is not None else self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps(one._asdict()) + "\n")
        process.stdin.flush()
        return process

    def end(self) -> None:
        """End the process, where there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes its pipes, and waits

    def _started(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # who is asked to stop at a terminal answers for it
        )
        self._process = process
        assert process.stdin is not None
        process.stdin.write(json.dumps({"path": sys.path}) + "\n")
        process.stdin.flush()
        if self._line(process) != "ready":
            raise StageError("math-verify cannot be started; see what `import math_verify` says")
        return process

    def _line(self, process: "subprocess.Popen[str]") -> str:
        """The next word of the process; empty where it ended, and then it is put away."""
        assert process.stdout is not None
        word = process.stdout.readline().strip()
        if not word:
            self.end()
        return word


_idle: "queue.LifoQueue[Comparer]" = queue.LifoQueue()
_all: list[Comparer] = []
_making = threading.Lock()


def equal(comparisons: Sequence[Comparison]) -> list[bool]:
    """Whether the two answers of each comparison are equal, several at a time where there are many.

    Raises:
        Unreadable: a right answer is no mathematics.
        StageError: math-verify does not work here.
    """
    count = min(cores(), -(-len(comparisons) // _FOR_A_PROCESS))
    if count <= 1:
        return [_one(comparison) for comparison in comparisons]
    with ThreadPoolExecutor(count, thread_name_prefix="maths") as pool:
        return list(pool.map(_one, comparisons))


def _one(comparison: Comparison) -> bool:
    comparer = _taken()
    try:
        return comparer.equal(comparison)
    finally:
        _idle.put(comparer)


def _taken() -> Comparer:
    try:
        return _idle.get_nowait()
    except queue.Empty:
        with _making:
            _all.append(Comparer())
            return _all[-1]


@atexit.register
def end_all() -> None:
    """End the processes; the next comparison starts new ones."""
    for comparer in _all:
        comparer.end()
