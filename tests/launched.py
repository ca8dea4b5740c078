"""`torchrun -m tests.launched FILE`: run a pipeline file in each process of a launch, as a program of a user's would;
and functions for such files."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.parse import read
from stagekit.pipeline import TrainingPipeline, to_plain
from stagekit.ranks import leave, rank


ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Launched:
    """Stages run by two processes, and the same stages run by one with batches twice as large."""

    folder: Path

    def both(self, name: str) -> tuple[Path, Path]:
        first, second = (next((self.folder / where).glob(f"*-{name}")) for where in ("together", "alone"))
        return first, second


def _note(what: str) -> None:
    """Keep a log of the calls, with the process that they came from."""
    with Path(os.environ["CALLS"]).open("a") as file:
        file.write(f"{what} {rank()}\n")


def measure(model: Any, dataset: Any) -> dict[str, float]:
    _note("measure")
    return {"mine": float(rank())}


def condition(result: Any) -> bool:
    _note("condition")
    return True


def started(stage: Any) -> None:
    _note("started")


def batch(step: int, loss: float) -> None:
    _note(f"batch {step} {loss:.6f}")


def own_loss(outputs: Any, labels: Any, num_items: Any) -> Any:
    """The loss that a supervised stage has anyway."""
    import torch

    logits, wanted = outputs.logits[:, :-1], labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
    return total / (num_items if num_items is not None else (wanted != -100).sum())


def fails_on_the_second(outputs: Any, labels: Any, num_items: Any) -> Any:
    if rank() == 1:
        raise ValueError("no loss on the second process")
    return own_loss(outputs, labels, num_items)


def other_rows(dataset: Any, split: str) -> Any:
    return dataset.select(range(rank(), len(dataset)))


def torchrun(folder: Path, pipeline: TrainingPipeline, code: int = 0, processes: int = 2, **more: str) -> str:
    """What this program says, run in each process of a launch."""
    file = folder / "launched.yaml"
    file.write_text(yaml.safe_dump(to_plain(pipeline)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ran = subprocess.run(
        [*command, "-m", "tests.launched", str(file)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **more}, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout


def main() -> int:
    pipeline = TrainingPipeline(**read(Path(sys.argv[1])))
    try:
        result = pipeline.run(quiet=True)
    except (ConfigError, Interrupted, StageError) as error:
        print(f"{rank()} {type(error).__name__}: {error}", flush=True)
        return 1
    said = {"rank": rank(), "policy": result.policy, "steps": [stage.steps for stage in result.stages]}
    print(json.dumps(said), flush=True)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
