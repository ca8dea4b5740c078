"""Run a stage with its TRL trainer: check the hand-over, train from the last checkpoint, save, evaluate."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagekit import ranks
from stagekit.building import build, init_kwargs
from stagekit.errors import StageError
from stagekit.files import whole_folder
from stagekit.job import Job, Outcome
from stagekit.result import OUT_OF_TIME


logger = logging.getLogger(__name__)

STEP0_TOLERANCE = {"bf16": 3e-2, "fp16": 3e-2, "tf32": 1e-2, "none": 1e-3}
"""Largest relative difference between the first loss and the one that policy == reference gives."""


def train(job: Job) -> Outcome:
    """Train the stage from its last checkpoint, or from the start, and save its policy or reward model.

    Raises:
        ConfigError: this machine cannot do what the stage asks for.
        StageError: the hand-over does not hold, no row is left to train on, or the result cannot be saved.
        Interrupted: the user asked to stop; a checkpoint is there.
    """
    from stagekit.callbacks import ended, last_checkpoint

    if job.stage.is_evaluation_only:
        return evaluate(job)
    _check_rows(job)
    resume = ranks.once(lambda: last_checkpoint(job.checkpoints))
    over = ended(resume, job.stage.max_duration_seconds) if resume is not None else None
    trainer, callbacks = build(job, resume, over is not None)
    rows = len(trainer.train_dataset)
    dropped = {**_count_dropped(job, trainer.rows_given["train"], rows), **job.stage.method.cut(trainer)}
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
        if ranks.rank() == 0:
            last_checkpoint(job.checkpoints)  # deletes one that was being written
        raise
    early = callbacks["early"].reason if "early" in callbacks else ""
    reason = callbacks["stop"].reason or early or (over or "").removeprefix("completed")
    metrics = _final_metrics(trainer)
    return Outcome(
        artifacts=ranks.once(lambda: _save_and_check(job, trainer)),
        metrics=metrics,
        steps=int(trainer.state.global_step),
        samples_trained=rows,
        dropped=dropped,
        stopped=reason if reason == OUT_OF_TIME else "",
    )


def _check_rows(job: Job) -> None:
    """The processes of a launch share out one set of rows, so each has to have read the same.

    Raises:
        StageError: one has others.
    """
    from stagekit.data import fingerprint

    def rows() -> list[str]:
        return [fingerprint(one) for one in (job.train_dataset, job.eval_dataset) if one is not None]

    if not ranks.same(rows):
        raise StageError(
            f"stage {job.stage.name!r}: its rows differ from process to process; a data_preprocessor that draws "
            "numbers needs a seed of its own"
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
    dropped = _count_dropped(job, trainer.rows_given["eval"], len(trainer.eval_dataset))
    found = trainer.evaluate()
    return Outcome(metrics=_tracked(trainer, found), dropped=dropped)


def _count_dropped(job: Job, given: int, rows: int) -> dict[str, int]:
    """Rows that the trainer left out of those it was given: too long, or without a token to learn from.

    Raises:
        StageError: none is left.
    """
    if rows == 0:
        raise StageError(
            f"stage {job.stage.name!r}: none of {given} rows is left to train on; they, or their prompts, exceed "
            f"max_length ({job.setting('max_length', 1024)}). Raise trl.max_length"
        )
    packed = bool(job.setting("packing"))
    return {"too_long": given - rows} if given > rows and not packed else {}


def _check_step0(job: Job, trainer: Any) -> None:
    """Before the first step the policy is the reference, so the loss is known. A difference is a wrong reference.

    Raises:
        StageError: with both numbers.
    """
    import torch

    expected = job.stage.method.step0_loss(job.stage)
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
    kind = next((one for one in ("bf16", "fp16", "tf32") if job.setting(one)), "none")
    lora = job.stage.lora
    tolerance = STEP0_TOLERANCE["bf16" if lora is not None and lora.bits is not None else kind]
    allowed = tolerance * max(abs(expected), 0.1)  # a loss near 0 is not known to a share of itself
    if not abs(loss - expected) <= allowed:
        raise StageError(
            f"stage {job.stage.name!r}: before the first step the {job.stage.method.type} loss is {loss:.6f}, but "
            f"with policy == reference it must be {expected:.6f} (tolerance {allowed:.6f}): "
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


def _save_and_check(job: Job, trainer: Any) -> dict[str, Any]:
    """The artifacts, each saved model loaded again and compared with the trained one."""
    before = job.stage.method.probe(job, trainer)
    artifacts = _save(job, trainer)
    job.stage.method.check_saved(job, job.folder / job.stage.method.artifact, before)
    return artifacts


def _save(job: Job, trainer: Any) -> dict[str, Any]:
    """Save the policy or reward model, whole or not at all: full weights, or the adapter, merged where the stage
    says so."""
    lora, artifact = job.stage.lora, job.stage.method.artifact
    target = job.folder / ("adapter" if lora is not None and lora.merge else artifact)
    if hasattr(trainer.model, "peft_config") and "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    with whole_folder(target) as folder:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
        job.checkpoints.mkdir(exist_ok=True)
        trainer.create_model_card(model_name=job.stage.name)
        (job.checkpoints / "README.md").replace(folder / "README.md")
    artifacts: dict[str, Any] = {artifact: f"{job.folder.name}/{artifact}"}
    if lora is not None:
        artifacts["adapter"] = f"{job.folder.name}/{target.name}"
        if lora.merge:
            _merge(job, trainer, target)
    return artifacts


def _merge(job: Job, trainer: Any, adapter: Path) -> None:
    """Merge the adapter into its base as saved, after the trainer's memory is free."""
    import gc

    import torch

    from stagekit.merging import merge_adapter
    from stagekit.reward_models import merge_reward_adapter

    merge = merge_adapter if job.stage.method.artifact == "policy" else merge_reward_adapter
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = None
    gc.collect()
    dtype = getattr(torch, str(init_kwargs(job.setting("model_init_kwargs")).get("dtype", "float32")))
    found = merge(adapter, job.folder / job.stage.method.artifact, dtype)
    logger.info("merged: logits differ by %.2e", found["merge_difference"])
