"""`python -m stagekit.child RUN INDEX DIGEST`: run one stage of a run folder. Started by `stagekit.children`."""

import os
import sys
import threading
from pathlib import Path

from stagekit.children import EXIT
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
    task = Task(pipeline, index, run, None if digest == "-" else digest, tuple(results))
    stop = Stop()
    _stop_with_parent(stop)
    with stop_on_signals(stop):
        try:
            run_stage(task, stop, Show())
        except (Interrupted, KeyboardInterrupt):
            return EXIT["interrupted"]
        except ConfigError:
            return EXIT["configuration"]
        except StageError:
            return EXIT["failed"]
    return EXIT["completed"]


def _stop_with_parent(stop: Stop) -> None:
    """Ask to stop when the parent is gone: it holds the other end of our standard input and writes nothing to it."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a waiting thread would hold when the interpreter ends
            pass
        stop.ask()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
