"""Make the TRL trainer of a stage: config, model, adapter, hooks, callbacks; and see that it is what was asked for.

The only module that creates TRL objects. Configs are made one at a time, right before their trainer: making one resets
accelerate's global state and breaks a trainer that is alive (trap T11).
"""

import importlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from stagekit.arguments import adam_options, own_schedule
from stagekit.custom import resolve
from stagekit.distributed import live_processes, splits
from stagekit.errors import ConfigError, Problem, StageError
from stagekit.job import Job
from stagekit.measures import is_likelihood, metric_key, text_metrics_of
from stagekit.trained import adapter_extras, hold


def build(job: Job, resume: Path | None, over: bool = False) -> tuple[Any, dict[str, Any]]:
    """The TRL trainer of the stage, with stagekit's hooks and callbacks; the callbacks by name.

    Args:
        resume: The checkpoint that training goes on from.
        over: Whether training had ended there.
    """
    from transformers.trainer_callback import PrinterCallback

    stage, method = job.stage, job.stage.method
    trainer_class, config_class = load(method.trainer_for(stage)), load(method.config_class)
    config = make_config(job, config_class)
    tracked = _what_is_tracked(job)
    callbacks = _callbacks(job, resume, over, tracked)
    hooks = _hooks(job, tracked, callbacks["stop"], callbacks.get("events"))
    hooked = type(f"Staged{trainer_class.__name__}", (_hooked(), trainer_class), {"hooks": hooks})
    evaluation = method.rows(job, job.eval_dataset)
    training = method.rows(job, job.train_dataset) if job.train_dataset is not None else evaluation
    trainer = hooked(
        model=_model(job),
        args=config,
        train_dataset=training,
        eval_dataset=evaluation,
        processing_class=job.tokenizer,
        callbacks=list(callbacks.values()),
        **_adapter_arguments(job),
        **method.trainer_arguments(job),
    )
    trainer.rows_given = {"train": len(training), "eval": len(evaluation) if evaluation is not None else 0}
    for callback in callbacks.values():
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.optimizer_cls_and_kwargs = _optimizer(job) or trainer.optimizer_cls_and_kwargs
    _read_back(job, trainer.args)
    _quiet_dropouts(job, trainer)
    method.built(job, trainer)
    if hooks.texts is not None:
        hooks.texts.plan(trainer.accelerator.unwrap_model(trainer.model))
    _round_reference(trainer.model)
    hold(job, trainer)
    return trainer, callbacks


def _adapter_arguments(job: Job) -> dict[str, Any]:
    """How a new adapter is put on the base, and the base quantised; nothing where an adapter is trained on."""
    lora = job.stage.lora
    if lora is None or job.model is None or job.model.adapter is not None:
        return {}
    from stagekit.models import lora_config

    extras = {**adapter_extras(job.stage, job.model.base), "use_rslora": lora.rslora, "use_dora": lora.dora}
    config = lora_config(lora.rank, lora.alpha, lora.dropout, lora.target_modules, job.stage.method.task, **extras)
    found: dict[str, Any] = {"peft_config": config}
    if lora.bits is not None:
        found["quantization_config"] = _quantization(job)
    return found


def _optimizer(job: Job) -> Any:
    """The class and arguments of an optimiser that TRL has no name for; None where it has one."""
    from stagekit.optimizers import optimizer_class

    stage = job.stage
    if stage.is_evaluation_only or not stage.method.trains:
        return None
    return optimizer_class(stage.optimizer_override, stage.resolved_learning_rate(), adam_options(stage))


def _schedule(job: Job) -> Any:
    """The stage's own schedule as `Hooks.schedule` wants it; None where TRL has it."""
    from stagekit.schedules import factor_of

    stage = job.stage
    if stage.is_evaluation_only or not stage.method.trains or not own_schedule(stage):
        return None
    kwargs = dict(stage.scheduler_kwargs)
    if stage.scheduler_type == "lambda":
        kwargs["function"] = resolve(kwargs["function"])
    if stage.scheduler_type == "cosine_annealing_warm_restarts":
        kwargs["num_cycles"] = stage.num_cycles

    def schedule(warmup_steps: int, total_steps: int, steps_per_epoch: float) -> Any:
        return factor_of(
            stage.scheduler_type,
            peak=stage.resolved_learning_rate(),
            floor=stage.min_learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            kwargs=kwargs,
        )

    return schedule


def load(name: str | None) -> Any:
    """The class behind `module:Class`."""
    assert name is not None
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _hooked() -> type:
    from stagekit.hooks import Hooked

    return Hooked


def make_config(job: Job, config_class: Any) -> Any:
    """The TRL config, from the plan and from what this machine is.

    Raises:
        ConfigError: an argument that the installed TRL does not have; a precision that this machine lacks.
    """
    import torch

    kwargs = {setting.target: setting.value for setting in job.settings}
    accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    kwargs.setdefault("use_cpu", not accelerator)
    if live_processes() > 1 and kwargs["use_cpu"]:
        kwargs.setdefault("ddp_backend", "gloo")
    kwargs["output_dir"] = str(job.checkpoints)
    given = kwargs.pop("model_init_kwargs", None)
    if job.model is not None and job.model.adapter is None:
        kwargs["model_init_kwargs"] = init_kwargs(given)
    known = {field.name for field in fields(config_class)}
    strange = [
        Problem(f"{job.stage.path}.trl.{key}", f"{config_class.__name__} has no such argument")
        for key in sorted(set(kwargs) - known)
    ]
    if kwargs.get("fp16") and not torch.cuda.is_available():
        message = "'fp16' runs on no CPU (it would silently be float32); use mixed_precision_dtype: bf16"
        strange.append(Problem(f"{job.stage.path}.mixed_precision_dtype", message))
    if kwargs.get("tf32") and not _has_tf32():
        message = "'tf32' needs an NVIDIA GPU of the Ampere generation or later, and there is none; use bf16 or none"
        strange.append(Problem(f"{job.stage.path}.mixed_precision_dtype", message))
    if strange:
        raise ConfigError(strange)
    return config_class(**kwargs)


def _has_tf32() -> bool:
    from transformers.utils import is_torch_tf32_available

    return bool(is_torch_tf32_available())


def init_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """How TRL loads the model by name: float32 unless told otherwise, and never from pickled weights."""
    return {"use_safetensors": True, **(given or {})}


def _model(job: Job) -> Any:
    """What the trainer is given as model: a name, or an adapter on its base that is to be trained on."""
    assert job.model is not None
    if job.model.adapter is None:
        return job.model.base
    from stagekit.models import device_map, load_policy

    ignored = sorted(set(job.setting("model_init_kwargs") or {}) - {"dtype"})
    if ignored:
        raise StageError(
            f"stage {job.stage.name!r}: trl.model_init_kwargs: {', '.join(ignored)} cannot be used where a stage "
            "goes on with the adapter that came in; drop them, or give its lora another rank to start a new one"
        )
    lora = job.stage.lora
    model = load_policy(
        job.model.adapter,
        dtype=init_kwargs(job.setting("model_init_kwargs")).get("dtype", "float32"),
        trainable=lora is not None,
        quantization=_quantization(job) if lora is not None and lora.bits is not None else None,
        device_map=device_map(),
    )
    if lora is not None:
        _set_lora_dropout(model, lora.dropout)
    return model


def _quantization(job: Job) -> Any:
    import torch

    from stagekit.models import bnb_config

    assert job.stage.lora is not None and job.stage.lora.bits is not None
    return bnb_config(job.stage.lora.bits, torch.bfloat16 if job.setting("bf16") else torch.float32)


def _set_lora_dropout(model: Any, p: float) -> None:
    """An adapter that is trained on was saved with the dropout of the stage before; this stage's counts."""
    import torch

    model.peft_config["default"].lora_dropout = p
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if dropouts is not None and "default" in dropouts:
            dropouts["default"] = torch.nn.Dropout(p) if p > 0 else torch.nn.Identity()


def _quiet_dropouts(job: Job, trainer: Any) -> None:
    """Keep only the adapter's own dropout where a preference method would have none: base and reference stay exact."""
    import torch

    if job.setting("disable_dropout") is not False or job.stage.lora is None:
        return
    for name, module in trainer.model.named_modules():
        if isinstance(module, torch.nn.Dropout) and ".lora_dropout.default" not in name:
            module.p = 0.0


def _round_reference(model: Any) -> None:
    """Over a quantised base TRL trains the adapter in bfloat16 and leaves its frozen copy in float32; a reference that
    is not rounded as the policy is differs from it before the first step."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".ref." in name:
            parameter.data = parameter.data.to(parameters[name.replace(".ref.", ".default.")].dtype)


def _what_is_tracked(job: Job) -> Any:
    from stagekit.hooks import Tracked

    stage = job.stage
    keys = {key: name for name, key in stage.method.metric_keys.items() if key}
    if is_likelihood(stage):
        keys["eval_perplexity"] = "perplexity"
    known = {"loss", "perplexity", "accuracy"}
    texts = frozenset(text_metrics_of(stage))
    keys.update({f"eval_{name}": name for name in texts})
    keys.update({"eval_win_rate_agreement": "win_rate"} if "win_rate" in texts else {})
    listed = "metrics_to_track" in stage.model_fields_set
    names = frozenset(stage.metrics_to_track)
    gated = texts & {stage.gate.metric.removeprefix("eval_")} if stage.gate is not None else frozenset()
    usual = (names & known | {"reward_score"}) & set(keys.values()) | texts
    return Tracked(keys, names | gated if listed else usual, all_own=not listed)


def _hooks(job: Job, tracked: Any, stop: Any, events: Any) -> Any:
    from stagekit.hooks import Hooks

    stage = job.stage
    hidden = set()
    if not stage.log_gradient_norms:
        hidden.add("grad_norm")
    if not stage.log_learning_rate:
        hidden.add("learning_rate")
    function, loss = stage.custom_evaluation_function, stage.custom_loss_function
    scale = stage.initial_loss_scale if "initial_loss_scale" in stage.model_fields_set else None
    return Hooks(
        hidden_logs=frozenset(hidden),
        perplexity=is_likelihood(stage),
        evaluate=resolve(function) if function is not None else None,
        texts=_texts(job),
        loss=resolve(loss) if loss is not None else None,
        sees_loss=events.sees if events is not None else None,
        loss_scale=scale,
        tags=("stagekit", *stage.tags),
        tracked=tracked,
        schedule=_schedule(job),
        must_save=stop.leaves,
    )


def _texts(job: Job) -> Any:
    """What measures the answers of the policy; None where no option names such a metric."""
    if not text_metrics_of(job.stage):
        return None
    from stagekit.text_metrics import text_evaluation

    return text_evaluation(job)


def _callbacks(job: Job, resume: Path | None, over: bool, tracked: Any) -> dict[str, Any]:
    """stagekit's callbacks, in the order in which they are called; the one that marks a checkpoint is the last."""
    from stagekit import callbacks

    stage = job.stage
    limit = stage.max_duration_seconds
    resumed_at = int(resume.name.rpartition("-")[2]) if resume else 0
    stop = callbacks.StopAndSave(job.stop, job.started, limit)
    found: dict[str, Any] = {
        "metrics": callbacks.Metrics(job.folder / "metrics.jsonl", resumed_at, over, tracked),
        "bar": callbacks.Bar(job.show, "training"),
        "stop": stop,
    }
    if splits(stage):
        found["wrapped"] = callbacks.Wrapped(stage.distributed_strategy)
    if stage.checkpoint_save_epochs > 0 and not stage.save_only_best:
        found["epochs"] = callbacks.SaveByEpoch(stage.checkpoint_save_epochs)
    measures = job.eval_dataset is not None and stage.evaluation_steps > 0
    if stage.early_stopping is not None and measures and not stage.is_evaluation_only and stage.method.trains:
        metric = stage.early_stopping.metric.removeprefix("eval_")
        found["early"] = callbacks.StopEarly(stage.early_stopping, metric_key(stage, metric), resume)

    def why() -> str | None:
        if stop.leaves():
            return None
        return stop.reason or (found["early"].reason if "early" in found else "") or "completed"

    found.update(stage.method.callbacks(job))
    found.update(_events(job, resume))
    found["totals"] = callbacks.Totals(resume, why, limit)
    found["marker"] = callbacks.Marker(stop.leaves)
    return found


def _events(job: Job, resume: Path | None) -> dict[str, Any]:
    """The callback that calls the user's functions; nothing where the user has none for epochs and batches."""
    from stagekit.events import Events

    given = job.stage.callbacks
    if given is None or (given.on_epoch_complete is None and given.on_batch_complete is None):
        return {}
    return {"events": Events(given, resume)}


_NORMALISED = {"model_init_kwargs", "report_to", "optim_args"}
"""Arguments that are kept in another form than they were given in, or to which this module adds."""


def _read_back(job: Job, args: Any) -> None:
    """What was asked for is what the trainer has: TRL and transformers change arguments without a word."""
    for setting in job.settings:
        has = getattr(args, setting.target)
        if setting.target in _NORMALISED or has == setting.value or getattr(has, "value", has) == setting.value:
            continue
        raise StageError(
            f"stage {job.stage.name!r}: {setting.target} should be {setting.value!r} ({setting.source}), but the "
            f"trainer has {has!r}; this version of TRL does not do what stagekit expects"
        )
