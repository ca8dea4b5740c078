"""Python code that nobody trusts, run apart from the trainer, with its tests; what runs is `sandbox_child`.

What each run has, all of it from the kernel (Linux 5.12 or newer):

* network: a network of its own, without an interface that is up;
* processes: a process namespace and a session of its own, ended whole when the time is up or the trainer dies;
* files: a file system of the interpreter's libraries (read only) and an empty folder, in memory and of limited size;
* rights: no capability, and another user where the trainer is root;
* limits: CPU time, memory and open files of a process, the size of a file, the number of processes;
* a clean environment, no standard input or output, `python -I -S`.

Where one of these is refused nothing is run, unless the caller says `unsafe`. The trainer's process executes nothing.
What is not kept apart is the code and its tests, which share an interpreter. Leaving early passes nothing, replacing
builtins does not reach the tests, and an object that is equal to everything is equal to no plain data by the == of a
test; but code that replaces what its tests import, or searches the interpreter for what runs it, can deceive them.
"""

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagekit.errors import StageError


logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("sandbox_child.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
_GRACE_SECONDS = 30.0
"""What a run may take longer than its time until its supervisor counts as stuck."""
_MEGABYTE = 1 << 20
_OPEN_FILES = 64
_said = threading.Event()
"""Set once it was said that code runs without a protection."""


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    cpu_seconds: int = 5
    """CPU time of each of its processes."""
    wall_seconds: float = 20.0
    """Time from the start of the code to the end of its last test."""
    memory_mb: int = 512
    """Address space of each of its processes."""
    files_mb: int = 16
    """What it may write, in all."""
    processes: int = 16
    """Processes and threads at a time, two of which are there already."""


class Refused(StageError):
    """The kernel does not give a protection; `refused` says which, and why."""

    def __init__(self, refused: Mapping[str, str]) -> None:
        self.refused = dict(refused)
        what = "; ".join(f"{name}: {why}" for name, why in self.refused.items())
        super().__init__(
            f"code cannot be run apart from this machine, since the kernel refuses {what}. It takes Linux 5.12 with "
            "namespaces: in a container, one started with --security-opt seccomp=unconfined or --privileged; on "
            "Ubuntu 24.04, sysctl kernel.apparmor_restrict_unprivileged_userns=0. Or set options: {unsafe: true}, to "
            "run it with the protections that there are, on a machine that you can lose"
        )


def passed(
    codes: Sequence[str],
    tests: Sequence[Sequence[str]],
    limits: Limits | None = None,
    *,
    packages: bool = False,
    unsafe: bool = False,
) -> list[int]:
    """How many of its tests each code passes; as many run at a time as this process has cores.

    A test passes if executing it, after the code and in a copy of its names, ends without an exception. What ends the
    process, or is not done in time, passes nothing from there on.

    Args:
        codes: Python code.
        tests: Python code of each test, of each code.
        limits: What a run may use.
        packages: Whether the packages that are installed here can be imported, beside the standard library.
        unsafe: Whether to run without the protections that the kernel refuses.

    Raises:
        Refused: the kernel refuses a protection.
        StageError: a run ended without a report.
    """
    one = functools.partial(_run, limits=limits or Limits(), packages=packages, unsafe=unsafe)
    if len(codes) == 1:
        return [one(codes[0], tests[0])]
    with ThreadPoolExecutor(min(cores(), len(codes)) or 1, thread_name_prefix="sandbox") as pool:
        return list(pool.map(one, codes, tests))


def cores() -> int:
    """The cores that are there for this process, of those that a launch's processes on this machine share."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(there // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 1)


@functools.cache
def refused() -> Mapping[str, str]:
    """What the kernel refuses here -> why; found by running a line of code."""
    try:
        found = _run("def one():\n    return 1", ["assert one() == 1"], Limits(), packages=False, unsafe=False)
    except Refused as error:
        return error.refused
    if found != 1:
        raise StageError(f"the sandbox does not work here: a test that holds fails in it ({sys.executable})")
    return {}


def _run(code: str, tests: Sequence[str], limits: Limits, *, packages: bool, unsafe: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="stagekit-sandbox-") as root:
        if unsafe and os.geteuid() == 0:
            Path(root).chmod(0o777)  # where it stays the working folder, it is that of another user
        report = _reported(_request(code, limits, root, packages, unsafe), list(tests), limits, unsafe)
    missing = report.get("refused", {})
    if "passed" not in report:
        raise Refused(missing)
    if missing and not _said.is_set():
        _said.set()
        named = "; ".join(f"{name} ({why})" for name, why in missing.items())
        logger.warning("code of completions runs without these protections (unsafe: true): %s", named)
    return int(report["passed"])


def _request(code: str, limits: Limits, root: str, packages: bool, unsafe: bool) -> dict[str, Any]:
    installed = _installed() if packages else []
    return {
        "code": code,
        "root": root,
        "folders": [*_standard_library(), *installed],
        "packages": installed,
        "megabytes": limits.files_mb,
        "wall_seconds": limits.wall_seconds,
        "unsafe": unsafe,
        "environment": {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", **_ONE_THREAD},
        "limits": {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory_mb * _MEGABYTE,
            "RLIMIT_FSIZE": limits.files_mb * _MEGABYTE,
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_NOFILE": _OPEN_FILES,
            "RLIMIT_CORE": 0,
        },
    }


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Numeric libraries would else start more threads than a run may have."""


@functools.cache
def _standard_library() -> tuple[str, ...]:
    """Folders that the interpreter reads, without those that lie in another one."""
    own = [str(Path(os.__file__).parent), *(str(Path(one, "lib")) for one in (sys.base_prefix, sys.base_exec_prefix))]
    found = sorted({*own, *_LIBRARIES}, key=len)
    there = [folder for folder in found if Path(folder).is_dir()]
    return tuple(one for one in there if not any(one != other and Path(one).is_relative_to(other) for other in there))


def _installed() -> list[str]:
    return [path for path in sys.path if path.rstrip("/").endswith(("site-packages", "dist-packages"))]


def _reported(request: dict[str, Any], tests: list[str], limits: Limits, unsafe: bool) -> dict[str, Any]:
    """What the supervisor reports.

    Raises:
        StageError: it ended without a report, which only code that runs `unsafe` can bring about.
    """
    body = json.dumps(request).encode()
    given = f"{len(body)}\n".encode() + body + json.dumps(tests).encode()
    environment = {key: value for key, value in os.environ.items() if key in {"PATH", "LD_LIBRARY_PATH"}}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    ) as child:
        try:
            out, told = child.communicate(given, timeout=limits.wall_seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, told = child.communicate()
    try:
        found: dict[str, Any] = json.loads(out)
    except ValueError:
        if unsafe:
            return {"passed": 0, "refused": {}}
        why = told.decode(errors="replace").strip()[-400:] or f"exit code {child.returncode}"
        raise StageError(f"the sandbox ended without a report: {why}") from None
    return found
