"""What the processes of a launch agree on. In a process alone every function does what its argument says, at once.

The processes of a launch run the same code on their share of the rows; rank 0 is the one that writes. What they say to
each other here goes through a group of its own (gloo, on the CPU), which waits without a limit: rank 0 may merge a
model or call a user's function for an hour, and a process that dies ends the waiting of the others.
"""

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from stagekit.distributed import live_processes
from stagekit.errors import ConfigError, Interrupted, StageError


T = TypeVar("T")

_RAISED = {kind.__name__: kind for kind in (StageError, ConfigError, Interrupted)}
_WITHOUT_LIMIT = timedelta(days=365)
_joined: list[Any] = []
"""The group, once this process has joined it."""
_failures = itertools.count()
"""Numbers the failures of a launch, in which a program may run several pipelines."""


def rank() -> int:
    """Which process of the launch this is, from 0; 0 outside of any."""
    return int(os.environ["RANK"]) if live_processes() > 1 else 0


def processes() -> int:
    """How many processes agree here: those of the launch, once this one has joined it."""
    return live_processes() if _joined else 1


def join(on_cpu: bool, timeout_seconds: int | None = None) -> None:
    """Take part in the launch that is live: meet the other processes. Nothing outside of a launch, or the second time.

    Args:
        on_cpu: Whether the stage leaves the machine's GPUs alone.
        timeout_seconds: How long a collective operation of the training may take; None = torch's own limit.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    if live_processes() == 1 or _joined:
        return
    import torch

    gpus = 0 if on_cpu else torch.cuda.device_count()
    here, place = int(os.environ.get("LOCAL_WORLD_SIZE", live_processes())), int(os.environ.get("LOCAL_RANK", rank()))
    if gpus and here > gpus:
        raise ConfigError(f"--num-processes: {here} processes on a machine with {gpus} GPUs; give {gpus} at most")
    if gpus:
        torch.cuda.set_device(place)
    if not torch.distributed.is_initialized():
        limit = timedelta(seconds=timeout_seconds) if timeout_seconds is not None else None
        torch.distributed.init_process_group("nccl" if gpus else "gloo", timeout=limit)
    _joined.append(torch.distributed.new_group(backend="gloo", timeout=_WITHOUT_LIMIT))


def leave() -> None:
    """End the part that this process has in the launch."""
    if _joined:
        import torch

        _joined.clear()
        torch.distributed.destroy_process_group()


def wait() -> None:
    """Wait until every process is here."""
    if _joined:
        import torch

        torch.distributed.barrier(group=_joined[0])


def tell(value: Any = None) -> Any:
    """What rank 0 says, in every process; the others' `value` is not read."""
    if not _joined:
        return value
    import torch

    said = [value if rank() == 0 else None]
    torch.distributed.broadcast_object_list(said, src=0, group=_joined[0])
    return said[0]


def all_told(mine: T) -> list[T]:
    """What each process says, by rank; in every process. It is pickled on its way."""
    if not _joined:
        return [mine]
    import torch

    told: list[Any] = [None] * processes()
    torch.distributed.all_gather_object(told, mine, group=_joined[0])
    return told


def once(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; every process has what it returns, or raises what it raised."""
    if not _joined:
        return function()
    if rank() > 0:
        kind, found = tell()
        if kind in _RAISED:
            raise _RAISED[kind](found)
        result: T = found
        return result
    try:
        result = function()
    except Exception as error:
        kind = type(error).__name__
        tell((kind, str(error)) if kind in _RAISED else ("StageError", f"{kind}: {error}"))
        raise
    tell(("", result))
    return result


def in_turn(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and then on the others, which find the files that it left (downloads, caches)."""
    if rank() > 0:
        wait()
    try:
        return function()
    finally:
        if rank() == 0:
            wait()


def largest(value: int) -> int:
    """The largest of the processes' numbers."""
    return int(_reduced(value, "MAX")) if _joined else value


def mean(value: float) -> float:
    """The mean of the processes' numbers."""
    return _reduced(value, "SUM") / live_processes() if _joined else value


def _reduced(value: float, how: str) -> float:
    import torch

    number = torch.tensor(float(value), dtype=torch.float64)
    torch.distributed.all_reduce(number, getattr(torch.distributed.ReduceOp, how), group=_joined[0])
    return float(number)


def same(value: Callable[[], Any]) -> bool:
    """Whether `value` gives in every process what it gives on rank 0. Not called in a process alone."""
    if not _joined:
        return True
    mine = value()
    return not largest(int(tell(mine) != mine))


def fails_first() -> bool:
    """Whether this process, which fails, is the first of the launch that does: then its reason is the cause, and what
    the others run into is that it is gone."""
    if not _joined:
        return rank() == 0
    import torch

    key = f"stagekit/failure-{next(_failures)}"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        limit = timedelta(seconds=10)
        store = torch.distributed.TCPStore(address, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
        return bool(store.compare_set(key, "", str(rank())) == str(rank()).encode())
    except RuntimeError:
        return rank() == 0  # the launcher, which keeps the store, is gone
