"""A pipeline: stages in order, and what must hold between them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from stagekit.checks import problems_across, problems_on_disk
from stagekit.errors import ConfigError
from stagekit.groups import Model
from stagekit.options import Options, raise_problems, values_only
from stagekit.stage import TrainingStage


if TYPE_CHECKING:
    from stagekit.result import PipelineResult


class TrainingPipeline(Options):
    """Stages that run one after the other, each on the result of the one before. Immutable.

    Raises ConfigError with every problem at once.
    """

    name: str = "pipeline"
    """What the run is called; also its folder, `runs/NAME`, where `output_dir` is not set."""

    model: Model = None
    """The model that the first stage starts from: hub id, path, GGUF file, `package:NAME/FILE`, or a live model."""

    output_dir: Path | None = None
    """The run folder. None = `runs/NAME`."""

    chat_template: str | None = None
    """A chat template (Jinja text, or a file) for a tokenizer that has none. It is saved with every result."""

    stages: tuple[TrainingStage, ...]
    """The stages, in order."""

    def _build(self, given: dict[str, Any]) -> None:
        BaseModel.__init__(self, **given)
        if not values_only.get():
            raise_problems(type(self), problems_across(self))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output_dir if self.output_dir is not None else Path("runs") / self.name

    def check(self) -> None:
        """Look at everything that can be checked without loading: files, columns, packages, functions.

        Raises:
            ConfigError: with all problems at once.
        """
        problems = problems_on_disk(self)
        if problems:
            raise ConfigError(problems)

    def run(
        self,
        *,
        fresh: bool = False,
        from_stage: str | None = None,
        until_stage: str | None = None,
        isolate: bool = False,
        num_processes: int | None = None,
        quiet: bool = False,
    ) -> "PipelineResult":
        """Run the stages that have no result yet, in this process (or each in a child, with `isolate`). Under torchrun
        every process calls this, and has the same result.

        Args:
            fresh: start over; results in the run folder are deleted.
            from_stage: run this stage and those after it again, whatever their results.
            until_stage: the last stage to run.
            isolate: one process per stage, as the command line does, and several for a stage with a
                `distributed_strategy`; not possible with live objects.
            num_processes: with `isolate`, how many these several are. None = one per GPU, 2 where there is none.
            quiet: print nothing.

        Raises:
            ConfigError: the declaration cannot run.
            StageError: a stage failed; what was done before it is kept.
            RunLocked: another process works in the run folder.
            Interrupted: Ctrl-C or SIGTERM; call again to go on.
        """
        from stagekit.walk import walk

        return walk(
            self,
            fresh=fresh,
            from_stage=from_stage,
            until_stage=until_stage,
            isolate=isolate,
            num_processes=num_processes,
            quiet=quiet,
        )


def to_plain(pipeline: TrainingPipeline) -> dict[str, Any]:
    """The pipeline as plain data in slot spelling, only what was set; what `pipeline.yaml` holds."""
    plain = pipeline.only_set()
    plain["stages"] = [stage.only_set() for stage in pipeline.stages]
    return {key: (str(value) if isinstance(value, Path) else value) for key, value in plain.items()}
