"""Pieces of work that do not depend on each other, shared out over the processes of a launch. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from stagekit import ranks
from stagekit.errors import Interrupted


P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Done(Generic[P, R]):
    """A piece that was done, and what came of it."""

    piece: P
    result: R
    mine: bool
    """Whether this process did it."""


def share_out(
    pieces: Sequence[P],
    do: Callable[[P], R],
    should_stop: Callable[[], bool] | None = None,
    stopped: Callable[[P], str] = str,
) -> Iterator[Done[P, R]]:
    """Do every piece once: of each wave of as many as there are processes every one does its own, and each process
    has what came of all, in the order of the pieces.

    What a piece gives must not depend on the process, nor on what was done before it in its wave.

    Args:
        should_stop: asked before each wave; that one process is to stop stops all.
        stopped: what is said then, of the first piece that is not done.

    Raises:
        Interrupted: `should_stop` said so, or `do` was interrupted in one process; what the others of its wave did
            comes first.
    """
    count, own = ranks.processes(), ranks.rank()
    for start in range(0, len(pieces), count):
        if should_stop is not None and ranks.largest(should_stop()):
            raise Interrupted(stopped(pieces[start]))
        wave = pieces[start : start + count]
        told = ranks.all_told(_tried(do, wave[own]) if own < len(wave) else None)
        for place, piece in enumerate(wave):
            tried = told[place]
            assert tried is not None
            if tried[0] is None:
                yield Done(piece, tried[1], place == own)
        interrupted = [one[0] for one in told if one is not None and one[0] is not None]
        if interrupted:
            raise Interrupted(interrupted[0])


def _tried(do: Callable[[P], R], piece: P) -> tuple[None, R] | tuple[str, None]:
    """What a piece gives, or why it was interrupted. Any other error ends the process, and so the launch."""
    try:
        return None, do(piece)
    except Interrupted as error:
        return str(error), None
