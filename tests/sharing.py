"""`torchrun -m tests.sharing FOLDER`: share pieces out over the processes of a launch, and write what each saw."""

import json
import sys
from pathlib import Path
from typing import Any

from stagekit import ranks
from stagekit.errors import Interrupted
from stagekit.shares import share_out


def seen(pieces: list[int], failing: int | None = None, asked_after: int = 10**6) -> dict[str, Any]:
    """What `share_out` gives this process, and what it did; a piece that is interrupted, or a wave before which the
    last process is asked to stop."""
    did: list[int] = []
    found: list[Any] = []
    waves = iter(range(10**6))

    def square(piece: int) -> int:
        if piece == failing:
            raise Interrupted(f"in piece {piece}")
        did.append(piece)
        return piece * piece

    def should_stop() -> bool:
        return next(waves) >= asked_after and ranks.rank() == ranks.processes() - 1

    try:
        for done in share_out(pieces, square, should_stop, lambda piece: f"before {piece}"):
            found.append([done.piece, done.result, done.mine])
    except Interrupted as error:
        return {"found": found, "did": did, "left": str(error)}
    return {"found": found, "did": did, "left": None}


def main(folder: Path) -> None:
    ranks.join(on_cpu=True)
    told = {
        "whole": seen([5, 3, 8, 1, 2]),
        "interrupted": seen([5, 3, 8, 1, 2], failing=8),
        "asked": seen([5, 3, 8, 1, 2], asked_after=2),
        "nothing": seen([]),
    }
    (folder / f"{ranks.rank()}.json").write_text(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
