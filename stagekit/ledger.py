"""What becomes of every option: used, or refused where it was set. Nothing is accepted in silence.

`problems_of_stage` is called for every stage that is built, `ledger` gives the full account for `plan`.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from stagekit.adapters import METHODS
from stagekit.adapters.base import SLOTS
from stagekit.errors import Problem
from stagekit.flat import FLAT
from stagekit.freezing import problems_of_freezing
from stagekit.measures import TEXT_METRICS, answers, is_likelihood, problems_of_measures
from stagekit.optimizers import problems_of_optimizer
from stagekit.options import Options
from stagekit.pending import PENDING, PENDING_VALUES
from stagekit.schedules import problems_of_schedule
from stagekit.stage_options import (
    CheckpointOptions,
    DistributedOptions,
    FreezingOptions,
    Loop,
    OptimizerOptions,
    ScheduleOptions,
    family_of,
)


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


class Entry(NamedTuple):
    """One option's account: `applied` (it does what it says), `not applicable` (this stage has no use for it), or
    `not built` (it would be refused if set)."""

    option: str
    value: Any
    set: bool
    disposition: Literal["applied", "not applicable", "not built"]
    reason: str


_ONLY_TRAINING = (OptimizerOptions, ScheduleOptions, FreezingOptions, CheckpointOptions, DistributedOptions)
_ROWS_TO_TRAIN = {"data_mixing_ratios", "shuffle_data", "data_shuffle_seed", "max_training_samples"}
_LOOP_OF_EVALUATION = {"batch_size", "random_seed", "use_deterministic_algorithms"}


def ledger(stage: "TrainingStage") -> tuple[Entry, ...]:
    """Every option of the stage with what becomes of it."""
    entries = []
    given = stage.model_fields_set
    for option in type(stage).model_fields:
        value, is_set = getattr(stage, option), option in given
        reason = not_applicable(stage, option)
        if reason is not None:
            entries.append(Entry(option, value, is_set, "not applicable", reason))
        elif option in PENDING:
            entries.append(Entry(option, value, is_set, "not built", PENDING[option]))
        else:
            entries.append(Entry(option, value, is_set, "applied", ""))
    for option in type(stage.method).model_fields:
        missing = _missing(stage, option)
        entries.append(
            Entry(
                f"method.{option}",
                getattr(stage.method, option),
                option in stage.method.model_fields_set,
                "not built" if missing is not None else "applied",
                missing or "",
            )
        )
    return tuple(entries)


def _missing(stage: "TrainingStage", key: str) -> str | None:
    """What an option of the method waits for; None where it works."""
    flat = _flat_of(stage, key)
    return None if flat is None else PENDING.get(flat)


def _flat_of(stage: "TrainingStage", key: str) -> str | None:
    """The flat name of a method option of this stage."""
    for name, home in FLAT.items():
        if home.path == f"method.{key}" and stage.method.type in home.types and name != "preference_loss_type":
            return name
    return None


def not_applicable(stage: "TrainingStage", option: str) -> str | None:
    """Why this stage type has no use for `option`; None where it has one."""
    method = stage.method
    if option == "method":
        return None
    if option in method.refused:
        return method.refused[option]
    if option == "custom_loss_function" and not method.takes_loss and Loop in method.families:
        return f"stage type {method.type!r} defines its loss itself; sft and constitutional take one of yours"
    if option in SLOTS:
        return None if option in method.slots else _no_use(stage, option)
    family = family_of("scheduler_type" if option == "scheduler_kwargs" else option)
    if family is None:
        return None
    if family not in method.families:
        return _no_use(stage, option)
    if stage.is_evaluation_only and (
        family in _ONLY_TRAINING or (family is Loop and option not in _LOOP_OF_EVALUATION)
    ):
        return "is_evaluation_only: true does not train"
    if stage.is_evaluation_only and option in _ROWS_TO_TRAIN:
        return "is_evaluation_only: true measures every row of validation_data as it is"
    return None


def _no_use(stage: "TrainingStage", option: str) -> str:
    """That the type has no use for a slot or a family, with the way out: the type's own, or who has one."""
    method = stage.method
    carriers = [name for name, cls in METHODS.items() if option in cls.slots and cls.missing is None]
    return method.instead or f"stage type {method.type!r} has no use for it; it belongs to {', '.join(carriers)}"


def problems_of_stage(stage: "TrainingStage") -> list[Problem]:
    """Everything that cannot work in this stage, from its declaration alone; paths relative to the stage."""
    if stage.method.missing is not None:
        missing = f"{stage.method.type!r} is not built yet: {stage.method.missing}"
        return [Problem("method.type", missing)]
    return [
        *_not_built(stage),
        *_not_used(stage),
        *_schedule(stage),
        *_precision(stage),
        *_freezing(stage),
        *_data(stage),
        *_measuring(stage),
        *_saving(stage),
        *_calling(stage),
        *_gate(stage),
        *_splitting(stage),
        *stage.method.problems(stage),
    ]


def _splitting(stage: "TrainingStage") -> Iterable[Problem]:
    if stage.distributed_strategy != "none" and stage.generation is not None and stage.generation.backend == "vllm":
        yield Problem(
            "generation.backend",
            "'vllm' takes the machine's GPUs for an engine of its own, and each process would start one; use "
            "transformers, or drop distributed_strategy",
        )


def _not_built(stage: "TrainingStage") -> Iterable[Problem]:
    for option in type(stage).model_fields:
        if option in PENDING and _differs(stage, option) and not_applicable(stage, option) is None:
            yield Problem(option, f"not built yet: {PENDING[option]}")
    for option in type(stage.method).model_fields:
        missing = _missing(stage, option)
        if missing is not None and _differs(stage.method, option):
            yield Problem(f"method.{option}", f"not built yet: {missing}")
    for (path, value), missing in PENDING_VALUES.items():
        owner: Any = stage
        for step in path.split(".")[:-1]:
            owner = getattr(owner, step, None)
        if getattr(owner, path.split(".")[-1], None) == value:
            yield Problem(path, f"{value!r} is not built yet: {missing}")


def _differs(owner: Options, option: str) -> bool:
    """Whether an option was set to something else than its default: that which happens anyway may be said."""
    if option not in owner.model_fields_set:
        return False
    default = type(owner).model_fields[option].get_default(call_default_factory=True)
    return bool(getattr(owner, option) != default)


def _says_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, Mapping | tuple) and not value)


def _not_used(stage: "TrainingStage") -> Iterable[Problem]:
    for option in type(stage).model_fields:
        if option in stage.model_fields_set and _says_something(getattr(stage, option)):
            reason = not_applicable(stage, option)
            if reason is not None:
                yield Problem(option, f"has no effect here: {reason}")


def _schedule(stage: "TrainingStage") -> Iterable[Problem]:
    given, schedule = stage.model_fields_set, stage.scheduler_type
    if not_applicable(stage, "scheduler_type"):
        return
    if "warmup_steps" in given and "warmup_ratio" in given and stage.warmup_steps > 0 and stage.warmup_ratio > 0:
        yield Problem("warmup_ratio", "warmup_steps is set as well; keep one of them")
    if stage.warmup_ratio >= 1:
        yield Problem(
            "warmup_ratio", f"{stage.warmup_ratio} leaves no step to train at the full rate; it must be below 1"
        )
    if "num_cycles" in given and schedule != "cosine_annealing_warm_restarts":
        yield Problem(
            "num_cycles", f"has no effect on {schedule!r}; use scheduler_type: cosine_annealing_warm_restarts"
        )
    if "scheduler_power" in given and schedule != "polynomial":
        yield Problem("scheduler_power", f"has no effect on {schedule!r}; use scheduler_type: polynomial")
    warmups = ("warmup_steps", "warmup_ratio")
    warmup = next((option for option in warmups if option in given and getattr(stage, option) > 0), None)
    yield from problems_of_schedule(
        schedule,
        stage.scheduler_kwargs,
        peak=stage.resolved_learning_rate(),
        floor=stage.min_learning_rate,
        warmup_set=warmup,
    )
    if schedule == "reduce_on_plateau" and (stage.validation_data is None or stage.evaluation_steps == 0):
        yield Problem("scheduler_type", "'reduce_on_plateau' follows the evaluations; give validation_data")
    yield from problems_of_optimizer(stage.optimizer_override, given)


def _precision(stage: "TrainingStage") -> Iterable[Problem]:
    if not_applicable(stage, "use_mixed_precision"):
        return
    given, dtype = stage.model_fields_set, stage.mixed_precision_dtype
    if "mixed_precision_dtype" in given and not stage.use_mixed_precision:
        if dtype != "none":
            yield Problem("mixed_precision_dtype", "has no effect without use_mixed_precision: true")
    elif stage.use_mixed_precision and dtype == "none":
        yield Problem("mixed_precision_dtype", "'none' contradicts use_mixed_precision: true")
    elif stage.use_mixed_precision and dtype.startswith("fp8"):
        without = "TRL's config has no fp8, and without TransformerEngine nothing would be computed in it; use bf16"
        yield Problem("mixed_precision_dtype", f"{dtype!r} is not supported: {without}")
    fp16 = stage.use_mixed_precision and dtype == "fp16"
    if fp16 and stage.lora is not None and stage.lora.bits is not None:
        cannot = "TRL trains the adapter of a quantised base in bfloat16, whose gradients fp16's scaler cannot unscale"
        yield Problem("mixed_precision_dtype", f"'fp16' does not go with lora.bits: {cannot}; use bf16")
    for option in ("use_dynamic_loss_scaling", "initial_loss_scale"):
        if option in given and (stage.is_evaluation_only or not stage.method.trains):
            yield Problem(option, "has no effect here: without training there is no gradient to scale")
        elif option in given and not fp16:
            yield Problem(option, "has no effect without use_mixed_precision: true and mixed_precision_dtype: fp16")
    if fp16 and not stage.use_dynamic_loss_scaling:
        constant = "torch's GradScaler knows no constant scale, and without one small gradients are lost"
        yield Problem("use_dynamic_loss_scaling", f"false is not supported: {constant}; leave it on, or use bf16")


def _freezing(stage: "TrainingStage") -> Iterable[Problem]:
    if not_applicable(stage, "freeze_base_model"):
        return
    yield from problems_of_freezing(
        freeze_base_model=stage.freeze_base_model,
        frozen=stage.frozen_layers,
        trainable=stage.trainable_layers,
        unfreeze_top_n=stage.unfreeze_top_n_layers,
        lora=stage.lora is not None,
    )
    if "gradual_unfreezing_interval" in stage.model_fields_set and not stage.use_gradual_unfreezing:
        yield Problem("gradual_unfreezing_interval", "has no effect without use_gradual_unfreezing: true")


def _data(stage: "TrainingStage") -> Iterable[Problem]:
    if stage.is_evaluation_only or "training_data" in stage.method.refused:
        if stage.validation_data is None:
            yield Problem("validation_data", "missing; an evaluation needs data to measure on")
        if stage.is_evaluation_only and stage.training_data is not None:
            yield Problem(
                "training_data", "has no effect with is_evaluation_only: true; put the data in validation_data"
            )
        return
    if stage.training_data is None and stage.method.needs_data:
        wanted = " or ".join(" + ".join(columns) for columns in stage.method.columns)
        yield Problem("training_data", f"missing; {stage.method.type} trains on data with {wanted}")
    yield from _order_of_rows(stage)


def _order_of_rows(stage: "TrainingStage") -> Iterable[Problem]:
    """How rows are mixed, drawn and ordered."""
    given, named = stage.model_fields_set, isinstance(stage.training_data, Mapping)
    if named and stage.data_mixing_ratios is None:
        yield Problem("data_mixing_ratios", "missing; training_data names several sets, say the share of each")
    if stage.data_mixing_ratios is not None:
        if not named:
            yield Problem("data_mixing_ratios", "needs training_data as a mapping name -> data")
        else:
            different = sorted(set(stage.data_mixing_ratios) ^ set(stage.training_data))
            if different:
                yield Problem(
                    "data_mixing_ratios", f"its names must be those of training_data; only one has {different}"
                )
    if "data_shuffle_seed" in given and not stage.shuffle_data and not named:
        yield Problem("data_shuffle_seed", "has no effect with shuffle_data: false")
    if stage.training_data is None and stage.max_training_samples is not None and not stage.method.needs_data:
        yield Problem("max_training_samples", "has no effect without training_data")
    if stage.method.trains:
        return
    untouched = "every row is read, in the order of the data"
    if "shuffle_data" in given and stage.max_training_samples is None:
        yield Problem("shuffle_data", f"has no effect without max_training_samples: {untouched}")
    if "data_shuffle_seed" in given and stage.max_training_samples is None and not named:
        yield Problem("data_shuffle_seed", f"has no effect without max_training_samples or a mix: {untouched}")


def _measuring(stage: "TrainingStage") -> Iterable[Problem]:
    given = stage.model_fields_set
    if stage.validation_data is None:
        for option in ("evaluation_steps", "early_stopping", "metrics_to_track", "custom_evaluation_function"):
            if option in given and getattr(stage, option) not in (None, 0) and not not_applicable(stage, option):
                yield Problem(option, "has no effect without validation_data")
        if stage.save_only_best:
            yield Problem("save_only_best", "needs validation_data to know what is best")
    elif stage.save_only_best and stage.evaluation_steps == 0:
        yield Problem("save_only_best", "needs evaluation_steps above 0 to know what is best")
    yield from problems_of_measures(stage)
    if "perplexity" in stage.metrics_to_track and "metrics_to_track" in given and not is_likelihood(stage):
        whose = f"{stage.method.type!r}, whose loss is" if not stage.method.perplexity else "a custom_loss_function,"
        yield Problem("metrics_to_track", f"'perplexity' means nothing for {whose} no likelihood")


def _saving(stage: "TrainingStage") -> Iterable[Problem]:
    given, metric = stage.model_fields_set, stage.best_checkpoint_metric
    if not_applicable(stage, "save_only_best"):
        return
    if not stage.save_only_best:
        for option in ("best_checkpoint_metric", "custom_metric_name", "best_checkpoint_metric_maximize"):
            if option in given:
                yield Problem(option, "has no effect without save_only_best: true")
        return
    for option in ("checkpoint_save_steps", "checkpoint_save_epochs", "max_checkpoints_to_keep"):
        if option in given:
            yield Problem(option, "has no effect with save_only_best: true, which saves at evaluations")
    reported = {*stage.method.metric_keys, *(TEXT_METRICS if answers(stage) else ())}
    if metric not in reported:
        known = ", ".join(sorted(reported))
        yield Problem("best_checkpoint_metric", f"{stage.method.type!r} does not report {metric!r}; it has {known}")
    if metric == "perplexity" and stage.method.perplexity and not is_likelihood(stage):
        yield Problem("best_checkpoint_metric", "'perplexity' means nothing for a custom_loss_function, no likelihood")
    if metric == "custom" and (not stage.custom_metric_name or stage.custom_evaluation_function is None):
        yield Problem(
            "custom_metric_name", "best_checkpoint_metric: custom needs it, and a custom_evaluation_function"
        )
    if metric != "custom" and stage.custom_metric_name:
        yield Problem("custom_metric_name", "has no effect without best_checkpoint_metric: custom")


_EVENTS_OF_TRAINING = ("on_epoch_complete", "on_batch_complete")


def _calling(stage: "TrainingStage") -> Iterable[Problem]:
    """The user's own functions: a loss beside TRL's, callbacks at events that never come."""
    if stage.custom_loss_function is not None and "loss_type" in stage.trl:
        yield Problem("trl.loss_type", "has no effect with custom_loss_function")
    if stage.callbacks is None or (stage.method.trains and not stage.is_evaluation_only):
        return
    for event in _EVENTS_OF_TRAINING:
        if getattr(stage.callbacks, event) is not None:
            yield Problem(f"callbacks.{event}", "never happens: the stage does not train by itself")


def _gate(stage: "TrainingStage") -> Iterable[Problem]:
    gate = stage.gate
    if gate is None:
        return
    if (gate.at_least is None) == (gate.at_most is None):
        yield Problem("gate", "needs one bound: at_least or at_most")
    leaves = (stage.method.trains and not stage.is_evaluation_only) or stage.method.type == "custom"
    if gate.otherwise == "keep_previous" and not (leaves and stage.method.artifact == "policy"):
        yield Problem("gate.otherwise", "'keep_previous' has no effect: the stage passes on no model; use stop")
