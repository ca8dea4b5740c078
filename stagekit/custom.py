"""Functions that a pipeline names, and the stage that is one."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stagekit.errors import Interrupted, StageError
from stagekit.groups import Callbacks
from stagekit.job import CustomContext, Job, Outcome
from stagekit.options import function_name


def resolve(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a `package.module:name`, or the callable itself.

    Raises:
        StageError: the module or the name is not there.
    """
    if not isinstance(function, str):
        return function
    module_name, _, name = function.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise StageError(f"the function {function!r} cannot be found: {error}") from error
    if not callable(found):
        raise StageError(f"{function!r} is no function, it is {type(found).__name__}")
    result: Callable[..., Any] = found
    return result


def call_back(functions: Callbacks | None, event: str, *arguments: Any) -> None:
    """Call the user's function for an event, where there is one.

    Raises:
        StageError: it raised something; names the event.
    """
    function = getattr(functions, event) if functions is not None else None
    if function is None:
        return
    found = resolve(function)
    try:
        found(*arguments)
    except Interrupted:
        raise
    except Exception as error:
        what = f"{function_name(function)} raised {type(error).__name__}: {error}"
        raise StageError(f"callbacks.{event}: {what}") from error


def tell_error(functions: Callbacks | None, error: BaseException) -> str:
    """Call `on_stage_error`; returns what to add to the reason, where that fails too."""
    try:
        call_back(functions, "on_stage_error", error)
    except StageError as another:
        return f"; then {another}"
    return ""


def call(job: Job, function: str | Callable[..., Any]) -> Outcome:
    """Run a custom stage: call its function and take what it returns as the stage's result.

    Raises:
        StageError: what it returned is no result.
    """
    context = CustomContext(
        model=job.model.generates if job.model else None,
        train_dataset=job.train_dataset,
        eval_dataset=job.eval_dataset,
        output_dir=job.folder,
        seed=job.stage.random_seed,
        metadata=job.stage.metadata,
        results=job.results,
        stop=job.stop,
    )
    returned = resolve(function)(context)
    if returned is None:
        return Outcome()
    if not isinstance(returned, Mapping) or set(returned) - {"policy", "metrics", "datasets"}:
        raise StageError(
            f"stage {job.stage.name!r}: its function returned {returned!r}; "
            "return None, or a mapping with policy, metrics, datasets"
        )
    artifacts: dict[str, Any] = {}
    if returned.get("policy") is not None:
        artifacts["policy"] = _place(job, "policy", returned["policy"])
    if returned.get("datasets"):
        artifacts["datasets"] = {
            name: _place(job, f"dataset {name!r} at", path) for name, path in returned["datasets"].items()
        }
    rows = len(job.train_dataset) if job.train_dataset is not None else 0
    metrics = {name: float(value) for name, value in (returned.get("metrics") or {}).items()}
    return Outcome(artifacts=artifacts, metrics=metrics, samples_trained=rows)


def _place(job: Job, what: str, given: str | Path) -> str:
    """What the function made, as the result names it: relative to the run folder where it is inside, else absolute.

    Raises:
        StageError: it is not there. A name without a place on disk can only be a hub id, and only for a model.
    """
    path = Path(given).expanduser()
    if not path.exists():
        if what == "policy" and isinstance(given, str) and not path.is_absolute() and given.count("/") <= 1:
            return given
        raise StageError(f"stage {job.stage.name!r}: its function returned {what} {given}, which is not there")
    run, absolute = job.folder.parent.resolve(), path.resolve()
    return str(absolute.relative_to(run)) if absolute.is_relative_to(run) else str(path.absolute())
