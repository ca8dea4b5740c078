"""`python -m stagekit.child RUN INDEX DIGEST`: run one stage of a run folder. Started by `stagekit.children`; where
the work is split, by `stagekit.launch`, once for each process."""

import os
import select
import sys
import threading
from pathlib import Path

from stagekit import ranks
from stagekit.children import EXIT
from stagekit.distributed import live_processes
from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.parse import read
from stagekit.pipeline import TrainingPipeline
from stagekit.result import StageResult
from stagekit.runner import Task, disabled, run_stage, stage_folder
from stagekit.show import Show
from stagekit.stopping import Stop, stop_on_signals


def main(arguments: list[str]) -> int:
    """Run the stage; the exit code says how it went, `result.json` says why."""
    run, index, digest = Path(arguments[0]), int(arguments[1]), arguments[2]
    pipeline = TrainingPipeline(**read(run / "pipeline.yaml"))
    stage = pipeline.stages[index]
    if stage.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    results = []
    for position, before in enumerate(pipeline.stages[:index]):
        if not before.enabled:
            results.append(disabled(before, position, run))
            continue
        result = StageResult.read(stage_folder(run, position, before.name) / "result.json", run)
        assert result is not None, f"stage {before.name!r} has no result"
        results.append(result)
    task = Task(pipeline, index, run, None if digest == "-" else digest, tuple(results), live_processes())
    stop = Stop()
    _stop_with_parent(stop)
    with stop_on_signals(stop):
        try:
            run_stage(task, stop, Show(quiet=ranks.rank() > 0))
        except (Interrupted, KeyboardInterrupt):
            # All stop together; torchrun would end the others, which may still be writing, when one says that it did.
            return EXIT["interrupted"] if ranks.rank() == 0 else 0
        except ConfigError:
            return EXIT["configuration"]
        except StageError:
            return EXIT["failed"]
    ranks.leave()
    return EXIT["completed"]


def _stop_with_parent(stop: Stop) -> None:
    """Ask to stop when the parent closes its end of our standard input, or is gone. Programs that the stage starts get
    another one: they must not hold the run's lock, which lies in it."""
    watched, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        hangup = select.poll()
        hangup.register(watched, 0)
        hangup.poll()
        stop.ask()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
