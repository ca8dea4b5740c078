"""Run a stage with its TRL trainer: build the config and the trainer, check the hand-over, train, save.

The only module that creates TRL objects. Configs are made one at a time, right before their trainer: making one resets
accelerate's global state and breaks a trainer that is alive (trap T11).
"""

import importlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from stagekit.custom import resolve
from stagekit.errors import ConfigError, Interrupted, Problem, StageError
from stagekit.files import whole_folder
from stagekit.job import Job, Outcome


logger = logging.getLogger(__name__)

STEP0_TOLERANCE = {"bf16": 3e-2, "fp16": 3e-2, "none": 1e-3}
"""Largest relative difference between the first loss and the one that policy == reference gives."""


def train(job: Job) -> Outcome:
    """Train the stage from its last checkpoint, or from the start, and save its policy.

    Raises:
        ConfigError: this machine cannot do what the stage asks for.
        StageError: the hand-over does not hold, no row is left to train on, or the result cannot be saved.
        Interrupted: the user asked to stop; a checkpoint is there.
    """
    from stagekit.callbacks import last_checkpoint

    if job.stage.is_evaluation_only:
        return evaluate(job)
    resume = last_checkpoint(job.checkpoints)
    trainer, callbacks = build(job, resume)
    rows = len(trainer.train_dataset)
    dropped = _count_dropped(job, rows)
    if resume is None:
        _check_step0(job, trainer)
    else:
        job.show.line(f"  goes on at step {resume.name.rpartition('-')[2]}")
    trained = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if callbacks["stop"].reason == "interrupted":
        raise Interrupted(f"stage {job.stage.name!r} stopped at step {trainer.state.global_step}")
    metrics = _final_metrics(trainer, trained.metrics)
    reason = callbacks["stop"].reason or (callbacks["early"].reason if "early" in callbacks else "")
    artifacts = _save(job, trainer)
    steps = int(trainer.state.global_step)
    return Outcome(
        artifacts=artifacts,
        metrics=metrics,
        steps=steps,
        samples_trained=rows,
        dropped=dropped,
        stopped=reason if reason == "max_duration" else "",
    )


def evaluate(job: Job) -> Outcome:
    """Measure the incoming model on the validation data; nothing is changed, nothing is passed on but the numbers."""
    trainer, _ = build(job, None)
    found = trainer.evaluate()
    return Outcome(metrics=_numbers(found), dropped=_count_dropped(job, len(trainer.eval_dataset), training=False))


def build(job: Job, resume: Path | None) -> tuple[Any, dict[str, Any]]:
    """The TRL trainer of the stage, with stagekit's hooks and callbacks; the callbacks by name."""
    from transformers.trainer_callback import PrinterCallback

    stage, method = job.stage, job.stage.method
    trainer_class, config_class = load(method.trainer_class), load(method.config_class)
    config = make_config(job, config_class)
    callbacks = _callbacks(job, resume)
    hooked = type(f"Staged{trainer_class.__name__}", (_hooked(), trainer_class), {"hooks": _hooks(job)})
    arguments: dict[str, Any] = {}
    if stage.lora is not None and job.model is not None and job.model.adapter is None:
        from stagekit.models import lora_config

        lora = stage.lora
        arguments["peft_config"] = lora_config(lora.rank, lora.alpha, lora.dropout, lora.target_modules)
    if stage.lora is not None and stage.lora.bits is not None and job.model is not None and job.model.adapter is None:
        arguments["quantization_config"] = _quantization(job)
    trainer = hooked(
        model=_model(job),
        args=config,
        train_dataset=job.train_dataset if job.train_dataset is not None else job.eval_dataset,
        eval_dataset=job.eval_dataset,
        processing_class=job.tokenizer,
        callbacks=list(callbacks.values()),
        **arguments,
    )
    trainer.remove_callback(PrinterCallback)
    _read_back(job, trainer.args)
    _quiet_dropouts(job, trainer)
    return trainer, callbacks


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
    kwargs["output_dir"] = str(job.checkpoints)
    given = kwargs.pop("model_init_kwargs", None)
    if job.model is not None and job.model.adapter is None:
        kwargs["model_init_kwargs"] = _init_kwargs(given)
    known = {field.name for field in fields(config_class)}
    strange = [
        Problem(f"{job.stage.path}.trl.{key}", f"{config_class.__name__} has no such argument")
        for key in sorted(set(kwargs) - known)
    ]
    if kwargs.get("fp16") and not torch.cuda.is_available():
        message = "'fp16' runs on no CPU (it would silently be float32); use mixed_precision_dtype: bf16"
        strange.append(Problem(f"{job.stage.path}.mixed_precision_dtype", message))
    if strange:
        raise ConfigError(strange)
    return config_class(**kwargs)


def _init_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """How TRL loads the model by name: float32 unless told otherwise, and never from pickled weights."""
    return {"use_safetensors": True, **(given or {})}


def _model(job: Job) -> Any:
    """What the trainer is given as model: a name, or an adapter on its base that is to be trained on."""
    assert job.model is not None
    if job.model.adapter is None:
        return job.model.base
    from stagekit.models import load_policy

    lora = job.stage.lora
    model = load_policy(
        job.model.adapter,
        dtype=_init_kwargs(job.setting("model_init_kwargs")).get("dtype", "float32"),
        trainable=lora is not None,
        quantization=_quantization(job) if lora is not None and lora.bits is not None else None,
        device_map=_device_map(),
    )
    if lora is not None:
        _set_lora_dropout(model, lora.dropout)
    return model


def _device_map() -> str | None:
    import torch

    return "auto" if torch.cuda.is_available() else None


def _quantization(job: Job) -> Any:
    import torch

    from stagekit.models import bnb_config

    assert job.stage.lora is not None and job.stage.lora.bits is not None
    return bnb_config(job.stage.lora.bits, torch.bfloat16 if job.setting("bf16") else torch.float32)


def _set_lora_dropout(model: Any, p: float) -> None:
    """An adapter that is trained on was saved with the dropout of the stage before; this stage's counts."""
    import torch

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


def _hooks(job: Job) -> Any:
    from stagekit.hooks import Hooks

    stage = job.stage
    hidden = set()
    if not stage.log_gradient_norms:
        hidden.add("grad_norm")
    if not stage.log_learning_rate:
        hidden.add("learning_rate")
    function = stage.custom_evaluation_function
    return Hooks(
        hidden_logs=frozenset(hidden),
        perplexity=stage.method.perplexity and "perplexity" in stage.metrics_to_track,
        evaluate=resolve(function) if function is not None else None,
        tags=("stagekit", *stage.tags),
    )


def _callbacks(job: Job, resume: Path | None) -> dict[str, Any]:
    from stagekit import callbacks

    stage = job.stage
    limit = stage.max_duration.total_seconds() if stage.max_duration is not None else None
    resumed_at = int(resume.name.rpartition("-")[2]) if resume else 0
    found: dict[str, Any] = {
        "marker": callbacks.Marker(),
        "metrics": callbacks.Metrics(job.folder / "metrics.jsonl", resumed_at),
        "bar": callbacks.Bar(job.show, "training"),
        "stop": callbacks.StopAndSave(job.stop, job.started, limit),
    }
    if stage.checkpoint_save_epochs > 0 and not stage.save_only_best:
        found["epochs"] = callbacks.SaveByEpoch(stage.checkpoint_save_epochs)
    measures = job.eval_dataset is not None and stage.evaluation_steps > 0
    if stage.early_stopping is not None and measures:
        found["early"] = callbacks.StopEarly(stage.early_stopping)
    return found


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


def _count_dropped(job: Job, rows: int, training: bool = True) -> dict[str, int]:
    """Rows that the trainer left out: too long, or without a token to learn from.

    Raises:
        StageError: none is left.
    """
    given = job.train_dataset if training else job.eval_dataset
    before = len(given) if given is not None else rows
    packed = bool(job.setting("packing"))
    if rows == 0:
        raise StageError(
            f"stage {job.stage.name!r}: none of {before} rows is left to train on; their prompts are longer than "
            f"max_length ({job.setting('max_length', 1024)}). Raise trl.max_length"
        )
    return {"too_long": before - rows} if before > rows and not packed else {}


def _check_step0(job: Job, trainer: Any) -> None:
    """Before the first step the policy is the reference, so the loss is known. A difference is a wrong reference.

    Raises:
        StageError: with both numbers.
    """
    import torch

    expected = job.stage.method.step0_loss()
    if expected is None:
        return
    count = min(len(trainer.train_dataset), 4)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(count)])
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(batch)
            loss = float(trainer.compute_loss(trainer.model, inputs))
    finally:
        trainer.model.train(was_training)
        for store in trainer._metrics.values():
            store.clear()
    kind = "bf16" if job.setting("bf16") else "fp16" if job.setting("fp16") else "none"
    lora = job.stage.lora
    tolerance = STEP0_TOLERANCE["bf16" if lora is not None and lora.bits is not None else kind]
    if not abs(loss - expected) <= tolerance * expected:
        raise StageError(
            f"stage {job.stage.name!r}: before the first step the {job.stage.method.type} loss is {loss:.6f}, but "
            f"with policy == reference it must be {expected:.6f} (tolerance {tolerance * expected:.6f}): "
            "the reference is not the model that came in"
        )
    logger.info("step 0 loss %.6f, expected %.6f", loss, expected)


def _final_metrics(trainer: Any, train_metrics: Mapping[str, float]) -> dict[str, float]:
    """Numbers of the training, and the last evaluation's."""
    found = {name: float(value) for name, value in train_metrics.items() if isinstance(value, int | float)}
    for entry in trainer.state.log_history:
        found.update({name: float(value) for name, value in entry.items() if name.startswith("eval_")})
    keep = ("train_loss", "train_runtime")
    return {name: value for name, value in found.items() if name in keep or name.startswith("eval_")}


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _save(job: Job, trainer: Any) -> dict[str, Any]:
    """Save the policy, whole or not at all: full weights, or the adapter, merged where the stage says so."""
    from stagekit.files import cannot_write

    lora = job.stage.lora
    target = job.folder / ("adapter" if lora is not None and lora.merge else "policy")
    if hasattr(trainer.model, "peft_config") and "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    try:
        with whole_folder(target) as folder:
            trainer.save_model(str(folder))
            (folder / "training_args.bin").unlink(missing_ok=True)
            shutil.rmtree(folder / "ref", ignore_errors=True)
    except Exception as error:
        if not _is_io(error):
            raise
        raise StageError(f"stage {job.stage.name!r}: {cannot_write(target, error)}") from error
    artifacts: dict[str, Any] = {"policy": f"{job.folder.name}/policy"}
    if lora is not None:
        artifacts["adapter"] = f"{job.folder.name}/{target.name}"
        if lora.merge:
            _merge(job, trainer, target)
    return artifacts


def _merge(job: Job, trainer: Any, adapter: Path) -> None:
    """Merge the adapter into its base as saved, after the trainer's memory is free."""
    import gc

    import torch

    from stagekit.models import merge_adapter

    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = None
    gc.collect()
    dtype = getattr(torch, str(_init_kwargs(job.setting("model_init_kwargs")).get("dtype", "float32")))
    found = merge_adapter(adapter, job.folder / "policy", dtype)
    logger.info("merged: logits differ by %.2e", found["merge_difference"])


def _is_io(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or "File too large" in str(error)
