"""Run a stage with its TRL trainer: build the config and the trainer, check the hand-over, train, save.

The only module that creates TRL objects. Configs are made one at a time, right before their trainer: making one resets
accelerate's global state and breaks a trainer that is alive (trap T11).
"""

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from stagekit.custom import resolve
from stagekit.errors import ConfigError, Problem, StageError
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
    from stagekit.callbacks import ended, last_checkpoint

    if job.stage.is_evaluation_only:
        return evaluate(job)
    resume = last_checkpoint(job.checkpoints)
    over = ended(resume) if resume is not None else None
    trainer, callbacks = build(job, resume, over is not None)
    rows = len(trainer.train_dataset)
    dropped = _count_dropped(job, rows)
    if resume is None:
        _check_step0(job, trainer)
    else:
        job.show.line(f"  goes on at step {resume.name.rpartition('-')[2]}")
    try:
        if resume is not None and over is not None:
            _take_over(trainer, resume)
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except BaseException:
        last_checkpoint(job.checkpoints)  # deletes one that was being written
        raise
    early = callbacks["early"].reason if "early" in callbacks else ""
    reason = callbacks["stop"].reason or early or (over or "").removeprefix("completed")
    metrics = _final_metrics(trainer)
    artifacts = _save(job, trainer)
    return Outcome(
        artifacts=artifacts,
        metrics=metrics,
        steps=int(trainer.state.global_step),
        samples_trained=rows,
        dropped=dropped,
        stopped=reason if reason == "max_duration" else "",
    )


def _take_over(trainer: Any, checkpoint: Path) -> None:
    """The state of a training that was over at its last checkpoint; to resume it would train on."""
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer._load_from_checkpoint(str(checkpoint))
    totals = json.loads((checkpoint / "totals.json").read_text(encoding="utf-8"))
    trainer._total_loss_scalar = totals["before"] + totals["window"]
    best = trainer.state.best_global_step
    if trainer.args.load_best_model_at_end and best:
        trainer.state.best_model_checkpoint = str(checkpoint.with_name(f"checkpoint-{best}"))
        trainer._load_best_model()


def evaluate(job: Job) -> Outcome:
    """Measure the incoming model on the validation data; nothing is changed, nothing is passed on but the numbers."""
    trainer, _ = build(job, None)
    dropped = _count_dropped(job, len(trainer.eval_dataset), training=False)
    found = trainer.evaluate()
    return Outcome(metrics=_tracked(trainer, found), dropped=dropped)


def build(job: Job, resume: Path | None, over: bool = False) -> tuple[Any, dict[str, Any]]:
    """The TRL trainer of the stage, with stagekit's hooks and callbacks; the callbacks by name.

    Args:
        resume: The checkpoint that training goes on from.
        over: Whether training had ended there.
    """
    from transformers.trainer_callback import PrinterCallback

    stage, method = job.stage, job.stage.method
    trainer_class, config_class = load(method.trainer_class), load(method.config_class)
    config = make_config(job, config_class)
    tracked = _what_is_tracked(job)
    callbacks = _callbacks(job, resume, over, tracked)
    hooks = _hooks(job, tracked, callbacks["stop"])
    hooked = type(f"Staged{trainer_class.__name__}", (_hooked(), trainer_class), {"hooks": hooks})
    arguments: dict[str, Any] = {}
    if stage.lora is not None and job.model is not None and job.model.adapter is None:
        from stagekit.models import lora_config

        lora = stage.lora
        arguments["peft_config"] = lora_config(lora.rank, lora.alpha, lora.dropout, lora.target_modules)
        if lora.bits is not None:
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
    callbacks["totals"].trainer = trainer
    trainer.remove_callback(PrinterCallback)
    _read_back(job, trainer.args)
    _quiet_dropouts(job, trainer)
    _round_reference(trainer.model)
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

    ignored = sorted(set(job.setting("model_init_kwargs") or {}) - {"dtype"})
    if ignored:
        raise StageError(
            f"stage {job.stage.name!r}: trl.model_init_kwargs: {', '.join(ignored)} cannot be used where a stage "
            "goes on with the adapter that came in; drop them, or give its lora another rank to start a new one"
        )
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
    if stage.method.perplexity:
        keys["eval_perplexity"] = "perplexity"
    known = {"loss", "perplexity", "accuracy"}
    listed = "metrics_to_track" in stage.model_fields_set
    names = frozenset(stage.metrics_to_track)
    return Tracked(keys, names if listed else names & known & set(keys.values()), all_own=not listed)


def _hooks(job: Job, tracked: Any, stop: Any) -> Any:
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
        perplexity=stage.method.perplexity,
        evaluate=resolve(function) if function is not None else None,
        tags=("stagekit", *stage.tags),
        tracked=tracked,
        must_save=stop.leaves,
    )


def _callbacks(job: Job, resume: Path | None, over: bool, tracked: Any) -> dict[str, Any]:
    """stagekit's callbacks, in the order in which they are called; the one that marks a checkpoint is the last."""
    from stagekit import callbacks

    stage = job.stage
    limit = stage.max_duration.total_seconds() if stage.max_duration is not None else None
    resumed_at = int(resume.name.rpartition("-")[2]) if resume else 0
    stop = callbacks.StopAndSave(job.stop, job.started, limit)
    found: dict[str, Any] = {
        "metrics": callbacks.Metrics(job.folder / "metrics.jsonl", resumed_at, over, tracked),
        "bar": callbacks.Bar(job.show, "training"),
        "stop": stop,
    }
    if stage.checkpoint_save_epochs > 0 and not stage.save_only_best:
        found["epochs"] = callbacks.SaveByEpoch(stage.checkpoint_save_epochs)
    measures = job.eval_dataset is not None and stage.evaluation_steps > 0
    if stage.early_stopping is not None and measures and not stage.is_evaluation_only and stage.method.trains:
        metric = stage.early_stopping.metric.removeprefix("eval_")
        key = stage.method.metric_keys.get(metric) or f"eval_{metric}"
        found["early"] = callbacks.StopEarly(stage.early_stopping, key, resume)

    def why() -> str | None:
        if stop.leaves():
            return None
        return stop.reason or (found["early"].reason if "early" in found else "") or "completed"

    found["totals"] = callbacks.Totals(resume, why)
    found["marker"] = callbacks.Marker(stop.leaves)
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


def _final_metrics(trainer: Any) -> dict[str, float]:
    """The mean loss over all steps, and of the last evaluation what is tracked."""
    steps = max(int(trainer.state.global_step), 1)
    found = {"train_loss": trainer._total_loss_scalar / steps}
    for entry in trainer.state.log_history:
        if "train_runtime" in entry:
            found["train_runtime"] = float(entry["train_runtime"])
        found.update(_tracked(trainer, entry))
    return found


def _tracked(trainer: Any, found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that `metrics_to_track` names."""
    tracked = trainer.hooks.tracked
    return {
        name: float(value)
        for name, value in found.items()
        if name.startswith("eval_") and isinstance(value, int | float) and tracked.listed(name)
    }


def _save(job: Job, trainer: Any) -> dict[str, Any]:
    """Save the policy, whole or not at all: full weights, or the adapter, merged where the stage says so."""
    from stagekit.files import cannot_write, is_full

    lora = job.stage.lora
    target = job.folder / ("adapter" if lora is not None and lora.merge else "policy")
    if hasattr(trainer.model, "peft_config") and "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    try:
        with whole_folder(target) as folder:
            trainer.save_model(str(folder))
            (folder / "training_args.bin").unlink(missing_ok=True)
            job.checkpoints.mkdir(exist_ok=True)
            trainer.create_model_card(model_name=job.stage.name)
            (job.checkpoints / "README.md").replace(folder / "README.md")
    except Exception as error:
        if not isinstance(error, OSError) and not is_full(error):
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
