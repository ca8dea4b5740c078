"""Run one stage: resolve what it reads, let its type do the work, write its result."""

import contextlib
import dataclasses
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagekit import ranks
from stagekit.arguments import settings_of
from stagekit.checks import as_data, slug
from stagekit.custom import call_back, resolve, tell_error
from stagekit.environment import peak_memory, stage_environment
from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.files import cannot_write, is_full, write_text
from stagekit.gate import through_gate
from stagekit.job import Job, ModelInput, Outcome
from stagekit.ledger import ledger
from stagekit.options import _plain
from stagekit.result import StageResult
from stagekit.show import Show
from stagekit.stopping import Stop


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline
    from stagekit.stage import TrainingStage


DISABLED = "enabled: false"


@dataclasses.dataclass(frozen=True)
class Task:
    """One stage of one run: where it stands in the pipeline, the run folder, the results before it, and over how many
    processes its work is split."""

    pipeline: "TrainingPipeline"
    index: int
    run: Path
    digest: str | None
    results: tuple[StageResult, ...]
    processes: int = 1

    @property
    def stage(self) -> "TrainingStage":
        """The stage to run."""
        return self.pipeline.stages[self.index]

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return stage_folder(self.run, self.index, self.stage.name)


def stage_folder(run: Path, index: int, name: str) -> Path:
    """`RUN/01-name`."""
    return run / f"{index + 1:02d}-{slug(name)}"


def run_stage(task: Task, stop: Stop, show: Show) -> StageResult:
    """Run the stage and write its `result.json`, last and whole.

    Raises:
        ConfigError, StageError: it cannot run, or failed; the result then says so.
        Interrupted: the user asked to stop; the result then says `stopped`.
    """
    started = time.monotonic()
    task.folder.mkdir(parents=True, exist_ok=True)
    try:
        with stage_environment(), _saying_why(task):
            ranks.join(bool(task.stage.trl.get("use_cpu")), task.stage.trl.get("ddp_timeout"))
            result = _run(task, stop, show, started)
            if result.status != "skipped":
                ranks.once(lambda: call_back(task.stage.callbacks, "on_stage_complete", result))
    except BaseException as error:
        if not ranks.fails_first():
            raise
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        kind = "stopped" if interrupted else "failed"
        reason = "interrupted" if interrupted else str(error) + tell_error(task.stage.callbacks, error)
        result = _result(task, kind, reason, Outcome(), started, {})
        with contextlib.suppress(StageError, OSError):
            if not interrupted:
                (task.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            result.write(task.folder / "result.json")
        raise
    if ranks.rank() == 0:
        (task.folder / "error.txt").unlink(missing_ok=True)
        result.write(task.folder / "result.json")
    return result


def disabled(stage: "TrainingStage", index: int, run: Path, digest: str | None = None) -> StageResult:
    """The account of a stage that is switched off."""
    return StageResult(stage.name, index + 1, stage.method.type, "skipped", DISABLED, digest, run=run)


@contextlib.contextmanager
def _saying_why(task: Task) -> Iterator[None]:
    """Any failure in a stage leaves it with the stage's name, and with a way out where one is known."""
    name = task.stage.name
    try:
        yield
    except StageError as error:
        if repr(name) in str(error) or task.stage.path in str(error):
            raise
        raise StageError(f"stage {name!r}: {error}") from error
    except (ConfigError, Interrupted):
        raise
    except MemoryError as error:
        raise StageError(f"stage {name!r}: out of memory; lower batch_size or generation.batch_tokens") from error
    except OSError as error:
        raise StageError(f"stage {name!r}: {cannot_write(Path(error.filename or task.folder), error)}") from error
    except Exception as error:
        if "out of memory" in str(error).lower():
            way = "lower batch_size, raise gradient_accumulation_steps, or set use_gradient_checkpointing: true"
            raise StageError(f"stage {name!r}: out of memory; {way}") from error
        if is_full(error):
            raise StageError(f"stage {name!r}: {cannot_write(task.folder, error)}") from error
        raise StageError(f"stage {name!r}: {type(error).__name__}: {error}") from error


def _run(task: Task, stop: Stop, show: Show, started: float) -> StageResult:
    stage = task.stage
    previous = task.results[-1] if task.results else None
    condition = stage.run_condition
    if condition is not None and not ranks.once(lambda: bool(resolve(condition)(previous))):
        return _result(task, "skipped", "run_condition returned False", Outcome(), started, {})
    ranks.once(lambda: _begin(task))
    job = _job(task, stop, show, started)
    identity = _check_tokenizer(task, job)
    job = stage.method.prepare(job)
    if ranks.largest(stop()):
        raise Interrupted(f"stage {stage.name!r} stopped before training")
    outcome = stage.method.run(job)
    outcome = dataclasses.replace(
        outcome,
        artifacts={**outcome.artifacts, **_datasets(job, task)},
        metrics={**job.metrics, **outcome.metrics},
        dropped={**job.dropped, **outcome.dropped},
    )
    outcome, held = ranks.once(lambda: through_gate(stage, outcome))
    if held:
        return _result(task, "completed", held, outcome, started, identity)
    return _result(task, "stopped" if outcome.stopped else "completed", outcome.stopped, outcome, started, identity)


def _datasets(job: Job, task: Task) -> dict[str, Any]:
    if not job.datasets:
        return {}
    return {"datasets": {name: str(path.relative_to(task.run)) for name, path in job.datasets.items()}}


def _begin(task: Task) -> None:
    """Call the user's function; write `stage.yaml` and `plan.json`: what was asked for, and what became of it all."""
    import yaml

    stage = task.stage
    call_back(stage.callbacks, "on_stage_start", stage)
    write_text(task.folder / "stage.yaml", yaml.safe_dump(_plain_yaml(stage.only_set()), sort_keys=False))
    plan = {
        "trainer": stage.method.trainer_class,
        "config": stage.method.config_class,
        "processes": task.processes,
        "settings": [setting._asdict() for setting in settings_of(stage)],
        "ledger": [{**entry._asdict(), "value": _plain(entry.value)} for entry in ledger(stage)],
    }
    write_text(task.folder / "plan.json", json.dumps(plan, indent=2, default=str) + "\n")


def _plain_yaml(value: Any) -> Any:
    """Plain data that YAML can say; live objects by what they are."""
    if isinstance(value, Mapping):
        return {str(key): _plain_yaml(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_yaml(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "total_seconds"):
        return f"{value.total_seconds():g}s"
    return f"<live {type(value).__name__}>"


def _job(task: Task, stop: Stop, show: Show, started: float) -> Job:
    """Everything that the stage reads, resolved."""
    stage = task.stage
    model = ranks.once(lambda: _model_input(task))
    tokenizer = None
    if model is not None and stage.method.trainer_class is not None:
        from stagekit.models import load_tokenizer

        tokenizer = load_tokenizer(model.generates, task.pipeline.chat_template)
    train, evaluation = ranks.in_turn(lambda: _datasets_in(task))
    _check_template(task, tokenizer, [train, evaluation])
    return Job(
        stage=stage,
        settings=settings_of(stage),
        folder=task.folder,
        results={result.name: result for result in task.results},
        previous=task.results[-1] if task.results else None,
        model=model,
        tokenizer=tokenizer,
        train_dataset=train,
        eval_dataset=evaluation,
        stop=stop,
        show=show,
        chat_template=task.pipeline.chat_template,
        started=started,
    )


def incoming_policy(task: Task) -> str | None:
    """The model of the nearest stage before that has one."""
    return next((result.policy for result in reversed(task.results) if result.policy is not None), None)


def _model_input(task: Task) -> ModelInput | None:
    """The stage's model as TRL is given it: by path. An adapter that cannot be trained on is merged first."""
    stage, value = task.stage, task.stage.model
    if isinstance(value, str) and value.startswith("stage:"):
        name = value.removeprefix("stage:")
        value = next(
            (getattr(one, stage.method.artifact) or one.policy for one in task.results if one.name == name), None
        )
        if value is None:
            raise StageError(f"stage {stage.name!r}: stage {name!r} left no model to start from")
    if value is None:
        value = incoming_policy(task) or task.pipeline.model
    if value is None:
        return None
    from stagekit.models import adapter_base, local_model

    if not isinstance(value, str):
        return ModelInput(_save_live(task, value))
    path = local_model(value, where=f"{stage.path}.model" if stage.model is not None else "model")
    if adapter_base(path) is None:
        return ModelInput(path)
    trains = stage.method.trains and not stage.is_evaluation_only
    base = str(adapter_base(path))
    if (not trains and stage.method.task == "CAUSAL_LM") or (stage.lora is not None and _goes_on(stage, path, base)):
        return ModelInput(base, adapter=path)
    return ModelInput(_merged(task, path))


def _goes_on(stage: "TrainingStage", adapter: str, base: str) -> bool:
    """Whether the incoming adapter is of the shape that the stage declares, so that it is trained on. One of a causal
    language model is not for a reward model's stage."""
    from stagekit.models import same_adapter
    from stagekit.trained import adapter_extras

    assert stage.lora is not None
    if stage.method.task != "CAUSAL_LM":
        return False
    return same_adapter(adapter, stage.lora.model_dump(), adapter_extras(stage, base))


def _merged(task: Task, adapter: str) -> str:
    """The incoming adapter merged into its base, once, in the stage's folder: the base of what this stage trains."""
    import torch

    from stagekit.merging import merge_adapter
    from stagekit.reward_models import merge_reward_adapter
    from stagekit.rows import json_object

    target = task.folder / "base"
    if not (target / "config.json").is_file():
        kind, wanted = json_object(Path(adapter, "adapter_config.json")).get("task_type"), task.stage.method.task
        if kind in {"SEQ_CLS", "TOKEN_CLS"} and kind != wanted:
            raise StageError(
                f"{adapter} is the adapter of a reward model ({kind}); {task.stage.name!r} needs {wanted}"
            )
        merge = merge_reward_adapter if kind == wanted != "CAUSAL_LM" else merge_adapter
        merge(adapter, target, torch.float32)
    return str(target.resolve())


def _save_live(task: Task, model: Any) -> str:
    """A live model is saved and then travels by path: trainers leave traces on a model for the next to trip over."""
    from stagekit.files import whole_folder
    from stagekit.models import load_tokenizer, snapshot_model

    target = task.folder / "input"
    origin = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    if not origin:
        raise StageError(
            f"stage {task.stage.name!r}: the live model does not say where its tokenizer is (name_or_path is empty); "
            "save both to a folder and give its path"
        )
    with whole_folder(target) as folder:
        snapshot_model(model).save_pretrained(folder)
        load_tokenizer(origin, task.pipeline.chat_template).save_pretrained(folder)
    return str(target.resolve())


def _datasets_in(task: Task) -> tuple[Any, Any]:
    """Training and validation data: loaded, mixed, preprocessed, cut; with the columns that the type needs."""
    stage = task.stage
    train = evaluation = None
    if stage.training_data is not None:
        train = (
            _mixed(task)
            if isinstance(stage.training_data, Mapping) and "source" not in stage.training_data
            else _load(task, stage.training_data, "training_data")
        )
    if stage.validation_data is not None:
        evaluation = _load(task, stage.validation_data, "validation_data")
    if stage.data_preprocessor is not None:
        preprocess = resolve(stage.data_preprocessor)
        train = preprocess(train, "train") if train is not None else None
        evaluation = preprocess(evaluation, "validation") if evaluation is not None else None
    from stagekit.data import check_columns, take

    seed = _data_seed(stage)
    if train is not None:
        if stage.max_training_samples is not None:
            train = take(train, min(stage.max_training_samples, len(train)), seed if stage.shuffle_data else None)
        if stage.method.columns:
            check_columns(train, stage.method.wanted_columns(), f"{stage.path}.training_data")
    if evaluation is not None and stage.method.validation_columns is not None:
        check_columns(evaluation, stage.method.validation_columns, f"{stage.path}.validation_data")
    return train, evaluation


def _data_seed(stage: "TrainingStage") -> int:
    return stage.random_seed if stage.data_shuffle_seed is None else stage.data_shuffle_seed


def _load(task: Task, value: Any, option: str) -> Any:
    from stagekit.data import load_data

    data, where = as_data(value), f"{task.stage.path}.{option}"

    def from_stage(name: str, dataset: str) -> Path:
        return next(result for result in task.results if result.name == name).dataset(dataset)

    return load_data(
        data.source, where=where, split=data.split, columns=data.columns or None, stage_datasets=from_stage
    )


def _as_conversations(dataset: Any) -> Any:
    """Prompts that are texts as conversations, so that they can be mixed with those that are."""
    from datasets import Dataset

    from stagekit.data import as_messages

    rows = ([dict(message) for message in as_messages(prompt, row)] for row, prompt in enumerate(dataset["prompt"]))
    return Dataset.from_dict({"prompt": list(rows)})


def _mixed(task: Task) -> Any:
    """Several sets by their shares; each reduced to the columns that the type reads, so that they fit together."""
    from stagekit.data import check_columns, mix

    stage = task.stage
    ratios = stage.data_mixing_ratios
    assert ratios is not None
    sets = {}
    for name, value in stage.training_data.items():
        loaded = _load(task, value, f"training_data.{name}")
        if stage.method.columns and stage.data_preprocessor is None:
            check_columns(loaded, stage.method.columns, f"{stage.path}.training_data.{name}")
            wanted = next(columns for columns in stage.method.columns if set(columns) <= set(loaded.column_names))
            also = [column for column in stage.method.optional_columns if column in loaded.column_names]
            loaded = loaded.select_columns([*wanted, *also])
        sets[name] = _as_conversations(loaded) if stage.method.columns == (("prompt",),) else loaded
    where = f"{stage.path}.data_mixing_ratios"
    return mix(
        sets,
        ratios,
        _data_seed(stage),
        where,
        source_column=stage.method.makes != (),
        limit=stage.max_training_samples,
    )


def _check_template(task: Task, tokenizer: Any, datasets: list[Any]) -> None:
    """Conversations need a chat template.

    Raises:
        ConfigError: there is none; names the option that gives one.
    """
    if tokenizer is None or tokenizer.chat_template:
        return
    for dataset in datasets:
        if (
            dataset is not None
            and len(dataset)
            and any(_is_conversation(dataset[0].get(column)) for column in dataset.column_names)
        ):
            raise ConfigError(
                f"chat_template: the tokenizer of stage {task.stage.name!r} has none, and its data are "
                "conversations; set chat_template in the pipeline (a file, or the template itself), "
                "or use plain text columns"
            )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _check_tokenizer(task: Task, job: Job) -> Mapping[str, Any]:
    """The template and the EOS token are those of the stage before; a drift would teach the model another format.

    Raises:
        StageError: with both values.
    """
    if job.tokenizer is None:
        return {}
    from stagekit.models import check_same_tokenizer, tokenizer_identity

    identity = tokenizer_identity(job.tokenizer)
    if task.stage.model is None:
        before = next(
            (result.tokenizer for result in reversed(task.results) if result.tokenizer and result.policy), None
        )
        if before is not None:
            check_same_tokenizer(before, identity, task.stage.name)
    return identity


def _result(
    task: Task, status: Any, reason: str, outcome: Outcome, started: float, tokenizer: Mapping[str, Any]
) -> StageResult:
    stage = task.stage
    return StageResult(
        name=stage.name,
        index=task.index + 1,
        type=stage.method.type,
        status=status,
        reason=reason,
        digest=task.digest,
        artifacts=outcome.artifacts,
        metrics=outcome.metrics,
        steps=outcome.steps,
        samples_trained=outcome.samples_trained,
        samples_dropped={reason: count for reason, count in outcome.dropped.items() if count},
        duration_seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=peak_memory(),
        processes=task.processes,
        tokenizer=tokenizer,
        description=stage.description,
        tags=stage.tags,
        metadata=_plain_yaml(stage.metadata),
        max_duration_seconds=stage.max_duration_seconds,
        run=task.run,
    )
