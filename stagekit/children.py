"""The parent's side of a stage that runs in a process of its own. Imports no torch.

The child holds the run's lock too (it inherits the open file), and ends when its parent does: the parent keeps the
other end of the child's standard input open, and the child asks itself to stop when that closes.
"""

import os
import signal
import subprocess
import sys
from typing import IO

from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.result import StageResult
from stagekit.runner import Task
from stagekit.stopping import Stop


EXIT = {"completed": 0, "failed": 1, "configuration": 2, "interrupted": 130}
"""How a child says how it ended."""


def run_in_child(task: Task, stop: Stop, held: IO[str]) -> StageResult:
    """Run the stage in a child and read its result.

    Raises:
        StageError, ConfigError, Interrupted: as the stage itself would, or when the child died.
    """
    command = [sys.executable, "-m", "stagekit.child", str(task.run), str(task.index), task.digest or "-"]
    environment = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=(held.fileno(),), start_new_session=True, env=environment
    )
    code = _waited(child, stop)
    result = StageResult.read(task.folder / "result.json", task.run)
    reason = result.reason if result is not None else ""
    if code == EXIT["completed"] and result is not None:
        return result
    if code == EXIT["interrupted"]:
        raise Interrupted(reason)
    if code == EXIT["configuration"]:
        raise ConfigError(reason)
    if code == EXIT["failed"] and result is not None:
        raise StageError(reason)
    message = f"stage {task.stage.name!r}: {_death(code)}. Run the same command again to go on from what is saved"
    if result is None:
        failed = StageResult(
            task.stage.name, task.index + 1, task.stage.method.type, "failed", message, task.digest, run=task.run
        )
        failed.write(task.folder / "result.json")
    raise StageError(message)


def _waited(child: "subprocess.Popen[bytes]", stop: Stop) -> int:
    """The child's exit code; asked to stop once, when the user asks, and killed when the user insists."""
    told = False
    try:
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop() and not told:
                    child.send_signal(signal.SIGTERM)
                    told = True
    except KeyboardInterrupt:
        child.kill()
        child.wait()
        raise
    finally:
        assert child.stdin is not None
        child.stdin.close()


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "its process was killed (signal 9), which is what the system does when memory runs out; "
            "lower batch_size or generation.batch_tokens, or set use_gradient_checkpointing: true"
        )
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process ended with code {code} and left no result"
