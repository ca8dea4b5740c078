"""`python -m stagekit.launch N RUN INDEX DIGEST`: one stage in N processes of `stagekit.child`, started by torchrun.

torchrun says in a page of text that a process failed, and always ends with 1. This ends as the process did that failed
first: with its exit code, or with 128 and the signal that it died of. Started by `stagekit.children`.
"""

import logging
import signal
import sys
from collections.abc import Iterable
from typing import Any


TOGETHER_SECONDS = 5
"""A process that died of a signal within this time of the first failure is its cause: the others lost it."""


def main(arguments: list[str]) -> int:
    """Run torchrun; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    count, *rest = arguments
    given = get_args_parser().parse_args(
        ["--standalone", "--nproc-per-node", count, "--module", "stagekit.child", *rest]
    )
    logging.disable(logging.ERROR)  # what torchrun says of a failure, the stage's result says better
    try:
        run(given)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return exit_code(error.failures.values())
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def exit_code(failures: Iterable[Any]) -> int:
    """The exit code of the cause among the processes that failed, each with `exitcode` (negative: a signal) and
    `timestamp` (seconds)."""
    found = sorted(failures, key=lambda failure: failure.timestamp)
    last = found[0].timestamp + TOGETHER_SECONDS
    died = [one for one in found if one.exitcode < 0 and one.exitcode != -signal.SIGTERM and one.timestamp <= last]
    code = int((died or found)[0].exitcode)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
