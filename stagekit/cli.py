"""The commands. Nothing heavy is imported before a command needs it: `--help` costs a tenth of a second.

Exit codes: 0 done, 1 a stage failed, 2 the configuration is wrong, 3 another process works in the run folder,
130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stagekit.errors import ConfigError, Interrupted, RunLocked, StageError


EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (ConfigError, 2),
    (RunLocked, 3),
    (Interrupted, 130),
    (KeyboardInterrupt, 130),
    (StageError, 1),
)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; returns its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not hasattr(given, "command"):
        parser.print_help()
        return 0
    return guarded(lambda: given.command(given), given.debug)


def guarded(command: Callable[[], int], debug: bool) -> int:
    """Run a command; errors become one message on standard error and an exit code, with `debug` a traceback too."""
    try:
        return command()
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except tuple(kind for kind, _ in EXIT_CODES) as error:
        if debug:
            raise
        name = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "error"
        print(f"stagekit: {name}: {error or 'interrupted'}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def _parser() -> argparse.ArgumentParser:
    about = "Train language models in declared stages on top of Hugging Face TRL."
    parser = argparse.ArgumentParser("stagekit", description=about)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        return sub

    runs = command("run", _run, "run a pipeline; goes on by itself where its folder has results")
    _takes_file(runs)
    add_run_options(runs)
    checks = command("check", _check, "tell every problem of a pipeline at once, without loading anything")
    _takes_file(checks)
    add_num_processes(checks)
    plans = command("plan", _plan, "print, stage by stage, the exact TRL arguments and where each came from")
    _takes_file(plans)
    plans.add_argument("--json", action="store_true", help="print JSON")
    add_num_processes(plans)
    stages = command("stages", _stages, "list the stage types, or one type's options with defaults")
    stages.add_argument("type", nargs="?", metavar="TYPE")
    stages.add_argument("--json", action="store_true", help="print JSON")
    command("schema", _schema, "print the JSON schema of a pipeline file, for editors")
    status = command("status", _status, "show the stages of a run folder: progress and results")
    status.add_argument("folder", metavar="RUN", type=Path)
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--samples", metavar="N", type=int, default=0, help="the texts of N prompts of every stage")
    return parser


def _takes_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a pipeline's YAML file")
    parser.add_argument("assignments", metavar="path=value", nargs="*", help="for instance stages.rl.method.beta=0.2")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run, shared by `stagekit run` and the recipes."""
    parser.add_argument("--output-dir", metavar="D", help="the run folder, instead of the pipeline's output_dir")
    parser.add_argument("--fresh", action="store_true", help="start over; results in the run folder are deleted")
    parser.add_argument("--from-stage", metavar="S", help="run this stage and those after it again")
    parser.add_argument("--until-stage", metavar="S", help="the last stage to run")
    add_num_processes(parser)


def add_num_processes(parser: argparse.ArgumentParser) -> None:
    """The option that says over how many processes the work of a stage is split."""
    about = "processes of a stage with distributed_strategy: ddp (default: one per GPU, 2 without)"
    parser.add_argument("--num-processes", metavar="N", type=int, help=about)


def _run(given: argparse.Namespace) -> int:
    from stagekit.parse import load

    assignments = [*given.assignments, *([f"output_dir={given.output_dir}"] if given.output_dir else [])]
    return run_pipeline(load(given.file, assignments), given)


def run_pipeline(pipeline: Any, given: argparse.Namespace) -> int:
    """Run a pipeline, each stage in a process of its own, and say where everything lies. Under torchrun the stages run
    in the processes that are there."""
    from stagekit.distributed import live_processes
    from stagekit.walk import walk

    result = walk(
        pipeline,
        fresh=given.fresh,
        from_stage=given.from_stage,
        until_stage=given.until_stage,
        isolate=live_processes() == 1,
        num_processes=given.num_processes,
    )
    from stagekit.ranks import rank
    from stagekit.report import show_end

    if rank() == 0:
        show_end(result)
    return 0


def _check(given: argparse.Namespace) -> int:
    from stagekit.distributed import count_processes, live_processes
    from stagekit.parse import load

    pipeline = load(given.file, given.assignments)
    count_processes(pipeline, given.num_processes, isolate=live_processes() == 1)
    count = len(pipeline.stages)
    print(f"{given.file}: {count} stage{'s' if count > 1 else ''}, nothing wrong")
    return 0


def _plan(given: argparse.Namespace) -> int:
    from stagekit.parse import load

    return print_plan(load(given.file, given.assignments), given.num_processes, given.json)


def print_plan(pipeline: Any, num_processes: int | None = None, as_json: bool = False) -> int:
    """Print the plan of a pipeline."""
    from stagekit.distributed import count_processes, live_processes
    from stagekit.plan import as_text, plan

    plans = plan(pipeline, count_processes(pipeline, num_processes, isolate=live_processes() == 1))
    print(json.dumps(plans, indent=2, default=str) if as_json else as_text(plans))
    return 0


def _stages(given: argparse.Namespace) -> int:
    from stagekit.catalog import catalog, catalog_text

    print(json.dumps(catalog(given.type), indent=2, default=str) if given.json else catalog_text(given.type))
    return 0


def _schema(given: argparse.Namespace) -> int:
    from stagekit.catalog import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _status(given: argparse.Namespace) -> int:
    from stagekit.report import show_status, status

    if given.json:
        print(json.dumps(status(given.folder, given.samples), indent=2, default=str))
    else:
        show_status(given.folder, given.samples)
    return 0
