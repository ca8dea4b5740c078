"""Pieces of work shared out over processes: each is done once, and all have all of it, in its order."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sharing import seen
from tests.test_isolation import ROOT


def test_a_process_alone_does_every_piece_in_turn() -> None:
    assert seen([5, 3, 8]) == {
        "found": [[5, 25, True], [3, 9, True], [8, 64, True]],
        "did": [5, 3, 8],
        "left": None,
    }
    assert seen([5, 3, 8], failing=3) == {"found": [[5, 25, True]], "did": [5], "left": "in piece 3"}
    assert seen([5, 3, 8], asked_after=2) == {
        "found": [[5, 25, True], [3, 9, True]],
        "did": [5, 3],
        "left": "before 8",
    }


@pytest.mark.slow
def test_processes_share_the_pieces_and_stop_together(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.sharing"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, *launch, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["whole"]["did"], second["whole"]["did"]) == ([5, 8, 2], [3, 1])
    squares = [[5, 25], [3, 9], [8, 64], [1, 1], [2, 4]]
    for told in (first, second):
        assert pairs(told["whole"]) == squares
        assert [mine for *_, mine in told["whole"]["found"]] == [
            piece in told["whole"]["did"] for piece, *_ in told["whole"]["found"]
        ]
        assert (pairs(told["interrupted"]), told["interrupted"]["left"]) == ([*squares[:2], [1, 1]], "in piece 8")
        assert (pairs(told["asked"]), told["asked"]["left"]) == (squares[:4], "before 2")
        assert pairs(told["nothing"]) == []


def pairs(told: dict[str, Any]) -> list[list[int]]:
    return [one[:2] for one in told["found"]]
