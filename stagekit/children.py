"""The parent's side of a stage that runs in a process of its own, or in several. Imports no torch.

The parent keeps the other end of the socket that is the stage's standard input. It never writes to it; that it closes
asks the stage to stop, and it closes too when the parent is gone. The open file with the run's lock is sent into the
socket and never received: whoever has the socket open holds the lock. So it reaches the processes of torchrun, which
inherit nothing but the standard streams.
"""

import os
import signal
import socket
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
    """Run the stage in a child, or in as many as its work is split over, and read its result.

    Raises:
        StageError, ConfigError, Interrupted: as the stage itself would, or when the child died.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"l"], [held.fileno()])
        child = subprocess.Popen(_command(task), stdin=theirs.fileno(), start_new_session=True, env=_environment(task))
        theirs.close()
        code = _waited(child, stop, ours, insist=signal.SIGINT if task.processes > 1 else signal.SIGKILL)
    result = StageResult.read(task.folder / "result.json", task.run)
    reason = result.reason if result is not None else ""
    died = code < 0 or (code > 128 and code != EXIT["interrupted"])
    if code == EXIT["completed"] and result is not None:
        return result
    if code == EXIT["interrupted"]:
        raise Interrupted(reason)
    if code == EXIT["configuration"]:
        raise ConfigError(reason)
    if code == EXIT["failed"] and result is not None:
        raise StageError(reason)
    message = f"stage {task.stage.name!r}: {_death(code, task.processes)}. Run the same command again to go on from "
    message += "what is saved"
    if result is None or died:
        failed = StageResult(
            task.stage.name, task.index + 1, task.stage.method.type, "failed", message, task.digest, run=task.run
        )
        failed.write(task.folder / "result.json")
    raise StageError(message)


def _command(task: Task) -> list[str]:
    what = [str(task.run), str(task.index), task.digest or "-"]
    if task.processes > 1:
        return [sys.executable, "-m", "stagekit.launch", str(task.processes), *what]
    return [sys.executable, "-m", "stagekit.child", *what]


def _environment(task: Task) -> dict[str, str]:
    found = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    if task.processes > 1:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // task.processes))
    return {**found, **os.environ}


def _waited(child: "subprocess.Popen[bytes]", stop: Stop, ours: socket.socket, insist: signal.Signals) -> int:
    """The child's exit code; asked to stop once, when the user asks, and ended with `insist` when the user insists."""
    try:
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop():
                    ours.close()
    except KeyboardInterrupt:
        child.send_signal(insist)
        child.wait()
        raise


def _death(code: int, processes: int = 1) -> str:
    whose = "its process" if processes == 1 else f"one of its {processes} processes"
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return (
            f"{whose} was killed (signal 9), which is what the system does when memory runs out; "
            "lower batch_size or generation.batch_tokens, or set use_gradient_checkpointing: true"
        )
    if number > 0:
        return f"{whose} died of {signal.Signals(number).name}"
    return f"{whose} ended with code {code} and left no result"
