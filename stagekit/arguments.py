"""From a stage to the arguments of its TRL config, as pure data: each with its value and where it came from.

Pure because creating any TrainingArguments resets accelerate's global state and breaks a trainer that is alive.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stagekit.adapters.base import Setting
from stagekit.distributed import splits
from stagekit.ledger import not_applicable
from stagekit.measures import metric_key
from stagekit.optimizers import OPTIMIZERS, arguments_of_optimizer
from stagekit.schedules import KINDS, plateau_kwargs


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


RESERVED = {
    "output_dir": "output_dir of the pipeline",
    "logging_strategy": "logging_steps of the stage",
    "eval_strategy": "evaluation_steps of the stage",
    "eval_steps": "evaluation_steps of the stage",
    "save_strategy": "checkpoint_save_steps and checkpoint_save_epochs of the stage",
    "load_best_model_at_end": "save_only_best of the stage",
    "resume_from_checkpoint": "nothing: a run resumes by itself",
    "local_rank": "the launcher",
    "deepspeed": "distributed_strategy of the stage",
    "fsdp": "distributed_strategy of the stage",
    "fsdp_config": "distributed_strategy of the stage",
    "gradient_checkpointing": "use_gradient_checkpointing of the stage",
    "seed": "random_seed of the stage",
    "data_seed": "data_shuffle_seed of the stage",
    "label_smoothing_factor": "nothing: TRL deprecated it",
    "trust_remote_code": "nothing: stagekit runs no remote code",
}
"""Keys that `trl` may not hold, and what to write instead."""

_DIRECT = {
    "max_gradient_norm": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "use_gradient_checkpointing": "activation_checkpointing",
    "weight_decay": "weight_decay",
    "max_checkpoints_to_keep": "save_total_limit",
    "epochs": "num_train_epochs",
}
"""Stage option -> the argument that carries its value unchanged."""

_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


def settings_of(stage: "TrainingStage") -> tuple[Setting, ...]:
    """Every argument of the stage's TRL config, from the stage's options, its method's, `trl`, and stagekit itself."""
    if stage.method.config_class is None:
        return ()
    own = [*_common(stage), *stage.method.settings(stage)]
    by_target = {setting.target: setting for setting in own}
    for key, value in stage.trl.items():
        mine = by_target.get(key)
        if mine is None or not mine.source.startswith("stages."):
            by_target[key] = Setting(key, value, f"{stage.path}.trl.{key}")
    return tuple(by_target.values())


def ignored_in_trl(stage: "TrainingStage") -> dict[str, str]:
    """Keys of `trl` that nothing reads, because the stage has an optimiser or a schedule of its own -> what to do."""
    found = {}
    if "optim_args" in stage.trl and OPTIMIZERS[stage.optimizer_override].cls is not None:
        found["optim_args"] = f"has no effect on optimizer_override {stage.optimizer_override!r}; drop it"
    if "lr_scheduler_kwargs" in stage.trl and own_schedule(stage):
        found["lr_scheduler_kwargs"] = f"has no effect on {stage.scheduler_type!r}; use scheduler_kwargs"
    return found


def _source(stage: "TrainingStage", option: str) -> str:
    return f"{stage.path}.{option}" if option in stage.model_fields_set else "default"


def _common(stage: "TrainingStage") -> Iterable[Setting]:
    evaluating = stage.is_evaluation_only or not stage.method.trains
    yield from _precision(stage)
    yield Setting("per_device_eval_batch_size", stage.batch_size, _source(stage, "batch_size"))
    yield Setting("report_to", "none", "stagekit (metrics.jsonl)")
    yield Setting("disable_tqdm", True, "stagekit (its own progress)")
    yield Setting("seed", stage.random_seed, _source(stage, "random_seed"))
    yield Setting(
        "full_determinism", stage.use_deterministic_algorithms, _source(stage, "use_deterministic_algorithms")
    )
    yield Setting("dataloader_pin_memory", False, "stagekit")
    yield Setting("per_device_train_batch_size", stage.batch_size, _source(stage, "batch_size"))
    if evaluating:
        yield Setting("activation_checkpointing", False, "stagekit (nothing is trained)")
        return
    for option, target in _DIRECT.items():
        if not_applicable(stage, option) is None:
            yield Setting(target, getattr(stage, option), _source(stage, option))
    steps = stage.max_steps
    yield Setting("max_steps", steps if steps > 0 else -1, _source(stage, "max_steps"))
    yield from _order(stage)
    if splits(stage):
        frozen = f"{stage.path}.use_gradual_unfreezing" if stage.use_gradual_unfreezing else "stagekit"
        yield Setting("ddp_find_unused_parameters", stage.use_gradual_unfreezing, frozen)
    yield from _optimizer(stage)
    yield from _schedule(stage)
    yield from _logging(stage)
    yield from _evaluation_and_saving(stage)


def _precision(stage: "TrainingStage") -> Iterable[Setting]:
    said = stage.use_mixed_precision and "mixed_precision_dtype" in stage.model_fields_set
    option = "mixed_precision_dtype" if said else "use_mixed_precision"
    source = _source(stage, option)
    chosen = stage.mixed_precision_dtype if stage.use_mixed_precision else "none"
    yield Setting("bf16", chosen == "bf16", source)
    yield Setting("fp16", chosen == "fp16", source)
    if chosen == "tf32":
        yield Setting("tf32", True, source)


def _order(stage: "TrainingStage") -> Iterable[Setting]:
    kind = "random" if stage.shuffle_data else "sequential"
    yield Setting("train_sampling_strategy", kind, _source(stage, "shuffle_data"))
    if stage.data_shuffle_seed is not None:
        yield Setting("data_seed", stage.data_shuffle_seed, _source(stage, "data_shuffle_seed"))


def adam_options(stage: "TrainingStage") -> dict[str, float]:
    """The betas and the epsilon as far as the user set them: an optimiser may have better ones of its own."""
    given = {option: getattr(stage, option) for option in _ADAM if option in stage.model_fields_set}
    return {**{option: stage.trl[option] for option in _ADAM if option in stage.trl}, **given}


def _optimizer(stage: "TrainingStage") -> Iterable[Setting]:
    for target, value in arguments_of_optimizer(stage.optimizer_override, adam_options(stage)).items():
        yield Setting(target, value, _source(stage, target if target in _ADAM else "optimizer_override"))
    if stage.learning_rate is not None:
        rate_source = _source(stage, "learning_rate")
    else:
        rate_source = f"default of {stage.method.type}" + (", times 10 with lora" if stage.lora else "")
    yield Setting("learning_rate", stage.resolved_learning_rate(), rate_source)


def own_schedule(stage: "TrainingStage") -> bool:
    """Whether the schedule is one of ours: TRL has none of the name, or none that ends at a floor."""
    restarts = stage.scheduler_type == "cosine_annealing_warm_restarts"
    return stage.scheduler_type not in _TRL_SCHEDULES or (restarts and stage.min_learning_rate > 0)


_TRL_SCHEDULES = {
    "constant",
    "cosine_annealing",
    "cosine_annealing_warm_restarts",
    "linear_warmup",
    "polynomial",
    "reduce_on_plateau",
}


def _schedule(stage: "TrainingStage") -> Iterable[Setting]:
    option = "warmup_steps" if stage.warmup_steps > 0 else "warmup_ratio"
    warmup: float = getattr(stage, option)
    if KINDS[stage.scheduler_type].no_warmup:
        yield Setting("warmup_steps", 0, f"{stage.path}.scheduler_type")
    else:
        yield Setting("warmup_steps", warmup, _source(stage, option))
    source = _source(stage, "scheduler_type")
    if own_schedule(stage):
        yield Setting("lr_scheduler_type", "constant", f"{source} (stagekit's own schedule)")
        return
    name, kwargs = _trl_schedule(stage, bool(warmup))
    yield Setting("lr_scheduler_type", name, source)
    if kwargs:
        options = {"min_learning_rate", "num_cycles", "scheduler_power", "scheduler_kwargs"} & stage.model_fields_set
        yield Setting("lr_scheduler_kwargs", kwargs, f"{stage.path}.{min(options)}" if options else "default")
    if stage.scheduler_type == "reduce_on_plateau" and not stage.save_only_best:
        yield Setting("metric_for_best_model", "eval_loss", source)
        yield Setting("greater_is_better", False, source)


def _trl_schedule(stage: "TrainingStage", warms_up: bool) -> tuple[str, dict[str, Any]]:
    floor = stage.min_learning_rate
    if stage.scheduler_type == "constant":
        return ("constant_with_warmup" if warms_up else "constant"), {}
    if stage.scheduler_type == "cosine_annealing":
        return ("cosine_with_min_lr", {"min_lr": floor}) if floor else ("cosine", {})
    if stage.scheduler_type == "cosine_annealing_warm_restarts":
        return "cosine_with_restarts", {"num_cycles": stage.num_cycles}
    if stage.scheduler_type == "linear_warmup":
        return ("polynomial", {"power": 1.0, "lr_end": floor}) if floor else ("linear", {})
    if stage.scheduler_type == "reduce_on_plateau":
        maximize = stage.save_only_best and stage.best_checkpoint_metric_maximize
        return "reduce_lr_on_plateau", plateau_kwargs(stage.scheduler_kwargs, maximize=maximize, floor=floor)
    return "polynomial", {"power": stage.scheduler_power, "lr_end": floor}


def _logging(stage: "TrainingStage") -> Iterable[Setting]:
    source = _source(stage, "logging_steps")
    yield Setting("logging_strategy", "steps" if stage.logging_steps else "no", source)
    if stage.logging_steps:
        yield Setting("logging_steps", stage.logging_steps, source)


def _evaluation_and_saving(stage: "TrainingStage") -> Iterable[Setting]:
    evaluates = stage.validation_data is not None and stage.evaluation_steps > 0
    source = (
        _source(stage, "evaluation_steps") if stage.validation_data is not None else "stagekit (no validation_data)"
    )
    yield Setting("eval_strategy", "steps" if evaluates else "no", source)
    if evaluates:
        yield Setting("eval_steps", stage.evaluation_steps, source)
    if stage.save_only_best:
        best = f"{stage.path}.save_only_best"
        own = f"eval_{stage.custom_metric_name}"
        metric = own if stage.best_checkpoint_metric == "custom" else metric_key(stage, stage.best_checkpoint_metric)
        yield Setting("save_strategy", "best", best)
        yield Setting("save_total_limit", 1, best)
        yield Setting("load_best_model_at_end", True, best)
        yield Setting("metric_for_best_model", metric, _source(stage, "best_checkpoint_metric"))
        maximize = stage.best_checkpoint_metric_maximize
        yield Setting("greater_is_better", maximize, _source(stage, "best_checkpoint_metric_maximize"))
        return
    source = _source(stage, "checkpoint_save_steps")
    yield Setting("save_strategy", "steps" if stage.checkpoint_save_steps else "no", source)
    if stage.checkpoint_save_steps:
        yield Setting("save_steps", stage.checkpoint_save_steps, source)
