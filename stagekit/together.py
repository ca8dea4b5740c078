"""A pipeline in a launch that is live: every process runs the same program, and rank 0 decides which stage is run."""

from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from stagekit import ranks
from stagekit.result import PipelineResult, StageResult
from stagekit.runner import Task, run_stage
from stagekit.show import Show
from stagekit.stopping import Stop, stop_on_signals


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline


Execute = Callable[[Task, Stop, Show, IO[str]], StageResult]


def walk_together(pipeline: "TrainingPipeline", walk: Callable[[Execute], PipelineResult]) -> PipelineResult:
    """Rank 0 walks over the stages, the others run each stage that it runs; all have its result in the end.

    Args:
        pipeline: The same in every process.
        walk: The walk, given what runs a stage. What it raises outside of a stage is raised in every process; in a
            stage each process fails by itself.
    """
    ranks.join(all(bool(stage.trl.get("use_cpu")) for stage in pipeline.stages))
    running = False
    ended: PipelineResult | Exception | None = None

    def lead(task: Task, stop: Stop, show: Show, held: IO[str]) -> StageResult:
        nonlocal running
        ranks.tell((task.index, task.run, task.digest, task.results, task.processes))
        running = True
        result = run_stage(task, stop, show)
        running = False
        return result

    def end() -> PipelineResult:
        assert ended is not None
        if isinstance(ended, Exception):
            raise ended
        return ended

    if ranks.rank() > 0:
        _follow(pipeline)
        return ranks.once(end)
    try:
        ended = walk(lead)
    except Exception as error:
        if running:
            raise
        ended = error
    ranks.tell(None)
    return ranks.once(end)


def _follow(pipeline: "TrainingPipeline") -> None:
    """Run the stages that rank 0 runs, until it says that there is none to come."""
    stop = Stop()
    with stop_on_signals(stop):
        while (given := ranks.tell()) is not None:
            index, run, digest, results, processes = given
            run_stage(Task(pipeline, index, run, digest, results, processes), stop, Show(quiet=True))
