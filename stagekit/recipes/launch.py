"""The command line of a recipe: no arguments run the small one on this machine."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagekit.cli import add_run_options, guarded, print_plan, run_pipeline


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline


def launch(
    recipe: Callable[[], "TrainingPipeline"],
    name: str,
    about: str,
    arguments: Sequence[str] | None = None,
    after: Callable[[Path], None] | None = None,
) -> int:
    """Run the recipe's pipeline, or the one in `--config`, with `path=value` overrides; returns the exit code.

    Args:
        recipe: Makes the pipeline.
        name: What the recipe is called.
        about: A sentence for its help.
        arguments: The command line; None: that of the process.
        after: Called with the folder of the last stage, once that has run.
    """
    parser = argparse.ArgumentParser(f"python -m stagekit.recipes.{name}", description=about)
    parser.add_argument(
        "assignments", metavar="path=value", nargs="*", help="for instance stages.rl-cai.method.beta=0.2"
    )
    parser.add_argument("--config", metavar="FILE", help="a pipeline's YAML file instead of the recipe's own")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the TRL arguments of each stage and where each came from"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_run_options(parser)
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _launch(recipe, given, after), given.debug)


def _launch(
    recipe: Callable[[], "TrainingPipeline"], given: argparse.Namespace, after: Callable[[Path], None] | None
) -> int:
    from stagekit.options import with_overrides
    from stagekit.parse import parse, read
    from stagekit.pipeline import to_plain

    raw = read(given.config) if given.config else to_plain(recipe())
    assignments = [*given.assignments, *([f"output_dir={given.output_dir}"] if given.output_dir else [])]
    pipeline = parse(with_overrides(raw, assignments), given.config)
    if given.dry_run:
        return print_plan(pipeline, given.num_processes)
    code = run_pipeline(pipeline, given)
    if after is not None and given.until_stage in {None, pipeline.stages[-1].name}:
        from stagekit.ranks import rank
        from stagekit.runner import stage_folder

        if rank() == 0:
            after(stage_folder(pipeline.folder, len(pipeline.stages) - 1, pipeline.stages[-1].name))
    return code
