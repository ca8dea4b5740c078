"""The walk over the stages of a run: what is done is kept, what changed is set aside, the rest is run."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import yaml

from stagekit.checks import as_data, data_of, functions_of, gives_policy, models_of, trains
from stagekit.digest import digests
from stagekit.distributed import count_processes, live_processes, processes_of
from stagekit.errors import ConfigError, Interrupted, Problem
from stagekit.files import lock, make_folder, write_text
from stagekit.iterations import START
from stagekit.journal import JOURNALS
from stagekit.pipeline import to_plain
from stagekit.result import PipelineResult, StageResult
from stagekit.runner import DISABLED, Task, _plain_yaml, disabled, stage_folder
from stagekit.show import Show, clock
from stagekit.stopping import Stop, stop_on_signals


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline
    from stagekit.stage import TrainingStage


_MODELS = ("policy", "reward_model", "adapter", "checkpoints", "base", "input")
"""Folders of a stage that hold weights."""

Execute = Callable[[Task, Stop, Show, IO[str]], StageResult]


def walk(
    pipeline: "TrainingPipeline",
    *,
    fresh: bool = False,
    from_stage: str | None = None,
    until_stage: str | None = None,
    isolate: bool = False,
    num_processes: int | None = None,
    quiet: bool = False,
) -> PipelineResult:
    """Run the stages in order; see `TrainingPipeline.run`."""
    pipeline.check()
    _check_names([stage.name for stage in pipeline.stages], from_stage, until_stage)
    if isolate:
        _refuse_live(pipeline)
    processes = count_processes(pipeline, num_processes, isolate)

    def steps(execute: Execute) -> PipelineResult:
        return _walk(pipeline, processes, fresh, from_stage, until_stage, execute, Show(quiet))

    if live_processes() > 1:
        from stagekit.together import walk_together

        return walk_together(pipeline, steps)
    return steps(_in_child if isolate else _here)


def _walk(
    pipeline: "TrainingPipeline",
    processes: int,
    fresh: bool,
    from_stage: str | None,
    until_stage: str | None,
    execute: Execute,
    show: Show,
) -> PipelineResult:
    names, stop, run = [stage.name for stage in pipeline.stages], Stop(), pipeline.folder.resolve()
    make_folder(run)
    with lock(run) as held, stop_on_signals(stop):
        if fresh:
            _clear(run)
        known = digests(pipeline, processes)
        write_text(run / "pipeline.yaml", yaml.safe_dump(_plain_yaml(to_plain(pipeline)), sort_keys=False))
        kept = _kept(pipeline, run, known, from_stage)
        from stagekit.lockfile import write_lock

        write_lock(pipeline, run, processes)
        _show_stages(pipeline, run, kept, show)
        last = names.index(until_stage) if until_stage is not None else len(names) - 1
        again = set(names[names.index(from_stage) :]) if from_stage is not None else set()
        results: list[StageResult] = []
        for index, stage in enumerate(pipeline.stages[: last + 1]):
            task = Task(pipeline, index, run, known[stage.name], tuple(results), processes_of(stage, processes))
            if stage.name not in kept and again & _reads(pipeline, index, results):
                again.add(stage.name)
            results.append(_step(task, kept.get(stage.name), stage.name in again, execute, stop, show, held))
            if stage.name not in kept:
                again.add(stage.name)
            _delete_unwanted(pipeline, run, results)
    return PipelineResult(run, tuple(results))


def _check_names(names: Sequence[str], from_stage: str | None, until_stage: str | None) -> None:
    have = ", ".join(names)
    given = {"--from-stage": from_stage, "--until-stage": until_stage}
    problems = [
        Problem(key, f"no stage {name!r}; there are {have}")
        for key, name in given.items()
        if name is not None and name not in names
    ]
    if problems:
        raise ConfigError(problems)


def _refuse_live(pipeline: "TrainingPipeline") -> None:
    """A child process gets the pipeline as a file, so nothing in it may be a live object or an unnamed function."""
    problems = [Problem("model", "is a live object")] if not isinstance(pipeline.model, str | None) else []
    for stage in pipeline.stages:
        named = [*models_of(stage), *((path, as_data(value).source) for path, value in data_of(stage))]
        problems += [Problem(path, "is a live object") for path, value in named if not isinstance(value, str)]
        unnamed = "is a function itself; name it 'package.module:function'"
        problems += [
            Problem(f"{stage.path}.{option}", unnamed)
            for option, function in functions_of(stage)
            if not isinstance(function, str)
        ]
    if problems:
        way = "stages in children need files and names (drop isolate)"
        raise ConfigError([Problem(one.path, f"{one.message}; {way}") for one in problems])


def _clear(run: Path) -> None:
    for path in run.iterdir():
        if path.is_dir() and any((path / name).exists() for name in ("digest", "stage.yaml", "result.json")):
            shutil.rmtree(path)


def _kept(
    pipeline: "TrainingPipeline", run: Path, known: dict[str, str | None], from_stage: str | None
) -> dict[str, StageResult]:
    """The results that stand: same digest, finished, and with the files that stages to be run will read."""
    kept: dict[str, StageResult] = {}
    longer: set[str] = set()
    forced = False
    for index, stage in enumerate(pipeline.stages):
        forced = forced or stage.name == from_stage
        result = StageResult.read(stage_folder(run, index, stage.name) / "result.json", run)
        if forced or not stage.enabled or result is None or not result.finished or result.reason == DISABLED:
            continue
        if result.digest is None or result.digest != known[stage.name]:
            continue
        before = pipeline.stages[index - 1] if index else None
        if stage.run_condition is not None and before is not None and before.enabled and before.name not in kept:
            continue  # the condition reads a result that will be a new one
        if result.goes_on(stage.max_duration_seconds) or longer & _reads(pipeline, index, list(kept.values())):
            longer.add(stage.name)
            continue
        kept[stage.name] = result
    changed = True
    while changed:
        changed = False
        for index, stage in enumerate(pipeline.stages):
            if stage.name in kept or not stage.enabled:
                continue
            for needed in _reads(pipeline, index, list(kept.values())):
                if needed in kept and not _there(kept[needed]):
                    del kept[needed]
                    changed = True
    return kept


def _reads(pipeline: "TrainingPipeline", index: int, results: Sequence[StageResult] = ()) -> set[str]:
    """Names of the stages whose files the stage at `index` reads, or may read: a stage with a condition or a gate
    can turn out to pass no model on, then that of the one before it is."""
    stage = pipeline.stages[index]
    found = set()
    models = (value for _, value in models_of(stage))
    for source in [*models, *(as_data(value).source for _, value in data_of(stage))]:
        if isinstance(source, str) and source.startswith("stage:"):
            found.add(source.removeprefix("stage:").partition("/")[0])
    if stage.model is None:
        passed = {result.name: result.status != "skipped" and not result.held_back for result in results}
        for before in reversed(pipeline.stages[:index]):
            if not gives_policy(before) or not passed.get(before.name, True):
                continue
            found.add(before.name)
            if before.name in passed or (before.run_condition is None and before.gate is None):
                break
    return found


def _there(result: StageResult) -> bool:
    models = [str(result.artifacts[name]) for name in ("policy", "reward_model") if result.artifacts.get(name)]
    places = [result.run / model for model in models if model.startswith(f"{result.index:02d}-")]
    bases = [base for place in places if (base := _base_of(place)) is not None and base.is_relative_to(result.run)]
    places += bases
    places += [result.run / str(path) for path in result.artifacts.get("datasets", {}).values()]
    return all(place.exists() for place in places)


def _base_of(adapter: Path) -> Path | None:
    """The folder of the model that an adapter was trained on; None where `adapter` is none, or its base no folder."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        return None
    base = Path(str(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")))
    return base if base.is_absolute() else None


def _step(
    task: Task, kept: StageResult | None, again: bool, execute: Execute, stop: Stop, show: Show, held: IO[str]
) -> StageResult:
    """One stage: kept, skipped, or run; `again`: from its start, since what it reads is new."""
    stage = task.stage
    title = f"[{task.index + 1}/{len(task.pipeline.stages)}] {stage.name}"
    if not stage.enabled:
        show.line(f"{title}: skipped (enabled: false)")
        result = disabled(stage, task.index, task.run, task.digest)
        before = StageResult.read(task.folder / "result.json", task.run)
        if before is None or not before.finished:
            task.folder.mkdir(exist_ok=True)
            result.write(task.folder / "result.json")
        return result
    if kept is not None:
        show.line(f"{title}: done before, kept ({clock(kept.duration_seconds)})")
        return kept
    if stop():
        raise Interrupted(_how_to_go_on(task))
    _set_aside(task, again, show)
    show.line()
    show.line(
        f"{title} · {stage.method.type}" + (f" · {stage.description}" if stage.description else ""), style="bold"
    )
    started = time.monotonic()
    try:
        result = execute(task, stop, show, held)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(_how_to_go_on(task)) from None
    said = f"  {result.status}" + (f" ({result.reason})" if result.reason else "")
    numbers = ", ".join(
        f"{name} {value:.4g}" for name, value in result.metrics.items() if name in {"train_loss", "eval_loss"}
    )
    rows = f", {result.samples_trained} rows, {result.steps} steps" if result.steps else ""
    show.line(f"{said} in {clock(time.monotonic() - started)}{rows}" + (f", {numbers}" if numbers else ""))
    return result


def _how_to_go_on(task: Task) -> str:
    return f"stopped in stage {task.stage.name!r}; what is done is in {task.run}. Run the same command again to go on"


def _set_aside(task: Task, again: bool, show: Show) -> None:
    """A finished or begun result of other settings is moved out of the way, not mixed with the new one. One of the
    same settings is gone on with, unless it is done or what it reads is new: then only its texts stay. One that ran
    out of its time is not done where it now has more."""
    before = StageResult.read(task.folder / "result.json", task.run)
    known = _declared_digest(task)
    if known is None or known == task.digest:
        (task.folder / "result.json").unlink(missing_ok=True)
        if again or (before is not None and before.finished and not before.goes_on(task.stage.max_duration_seconds)):
            for name in _MODELS:
                shutil.rmtree(task.folder / name, ignore_errors=True)
    else:
        target = task.run / "replaced" / f"{task.folder.name}-{known[:12]}"
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        task.folder.rename(target)
        task.folder.mkdir()
        _keep_texts(target, task.folder)
        show.line(
            f"  stage {task.stage.name!r} changed since it ran; its old folder is {target.relative_to(task.run)}"
        )
    task.folder.mkdir(exist_ok=True)
    write_text(task.folder / "digest", f"{task.digest or 'live'}\n")


def _keep_texts(old: Path, new: Path) -> None:
    """Copy the journals of a stage that changed: what it would write again is taken from them. Of its iterations too:
    the first one starts from the model that it started from before."""
    for name in JOURNALS:
        if (old / name).exists():
            shutil.copy2(old / name, new / name)
    for start in old.glob(f"iteration-*/{START}"):
        (new / start.parent.name).mkdir()
        shutil.copy2(start, new / start.parent.name)
        _keep_texts(start.parent, new / start.parent.name)


def _declared_digest(task: Task) -> str | None:
    """The digest that the folder's content was made under; None where there is no content yet."""
    path = task.folder / "digest"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _delete_unwanted(pipeline: "TrainingPipeline", run: Path, results: Sequence[StageResult]) -> None:
    """`save_checkpoint_after: false`: the model goes once the next stage has completed, and no later one and no
    adapter that stays is made on it; not where it is the last that no gate held back."""
    if not results[-1].finished:
        return
    unwanted = []
    for index, stage in enumerate(pipeline.stages[: len(results) - 1]):
        later = range(len(results), len(pipeline.stages))
        instead = results[index].policy is not None and all(one.policy is None for one in results[index + 1 :])
        held = instead and any(one.held_back for one in results[index + 1 :])
        if (
            not stage.save_checkpoint_after
            and not held
            and not any(stage.name in _reads(pipeline, place, results) for place in later)
        ):
            unwanted.append(stage_folder(run, index, stage.name))
    stay = [
        folder / name
        for result in results
        if (folder := stage_folder(run, result.index - 1, result.name)) not in unwanted
        for name in ("policy", "reward_model", "adapter")
    ]
    bases = {_base_of(adapter) for adapter in stay}
    for folder in unwanted:
        for name in _MODELS:
            if folder / name not in bases:
                shutil.rmtree(folder / name, ignore_errors=True)


def _show_stages(pipeline: "TrainingPipeline", run: Path, kept: dict[str, StageResult], show: Show) -> None:
    rows = []
    for number, stage in enumerate(pipeline.stages, start=1):
        state = "done" if stage.name in kept else "off" if not stage.enabled else "to do"
        rows.append((str(number), stage.name, stage.method.type, _data_said(stage), _how(stage), state))
    show.table(f"{pipeline.name} -> {run}", ("", "stage", "method", "data", "how", "state"), rows)


def _data_said(stage: "TrainingStage") -> str:
    sources = [as_data(value).source for _, value in data_of(stage)]
    names = [
        f"<{type(source).__name__}>"
        if not isinstance(source, str)
        else source
        if source.startswith("stage:")
        else source.rpartition("/")[2]
        for source in sources
    ]
    return " + ".join(names) or "-"


def _how(stage: "TrainingStage") -> str:
    if not trains(stage):
        return "evaluation only" if stage.is_evaluation_only or stage.method.type == "evaluation" else "-"
    lora = (
        f"LoRA r={stage.lora.rank}" + (f" {stage.lora.bits} bit" if stage.lora.bits else "")
        if stage.lora
        else "full weights"
    )
    length = (
        f"{stage.max_steps} steps" if stage.max_steps else f"{stage.epochs} epoch" + ("s" if stage.epochs > 1 else "")
    )
    precision = stage.mixed_precision_dtype if stage.use_mixed_precision else "fp32"
    return f"{lora}, {length}, {precision}, lr {stage.resolved_learning_rate():g}"


def _here(task: Task, stop: Stop, show: Show, held: IO[str]) -> StageResult:
    from stagekit.runner import run_stage

    return run_stage(task, stop, show)


def _in_child(task: Task, stop: Stop, show: Show, held: IO[str]) -> StageResult:
    from stagekit.children import run_in_child

    return run_in_child(task, stop, held)
