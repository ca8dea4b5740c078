"""What the preference methods with a reference share: which model it is, how it is kept, when it is updated."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stagekit.adapters.base import Setting
from stagekit.errors import Problem
from stagekit.groups import Reference


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


OWNED = {
    "loss_type": "method.loss",
    "loss_weights": "method.loss",
    "label_smoothing": "method.label_smoothing",
    "precompute_ref_log_probs": "reference.mode",
    "sync_ref_model": "reference.update_every",
    "ref_model_sync_steps": "reference.update_every",
    "ref_model_mixup_alpha": "reference.update_every",
}
"""Arguments that change what stagekit must know of the loss and the reference."""

REPORTS = frozenset(
    {f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    | {"rewards/margins", "entropy", "aux_loss"}
)
"""What the trainers of pairs tell of an evaluation."""


def reference_of(stage: "TrainingStage") -> Reference:
    """The stage's reference, declared or not."""
    return stage.reference if stage.reference is not None else Reference()


def precomputes(stage: "TrainingStage") -> bool:
    """Whether the reference's log-probabilities are computed once, before training."""
    reference = reference_of(stage)
    if reference.mode in {"precompute", "none"}:
        return True
    return reference.mode == "auto" and stage.lora is None and reference.update_every is None


def reference_settings(stage: "TrainingStage") -> Iterable[Setting]:
    """How TRL keeps the reference, and whether dropout stays on for an adapter."""
    reference = reference_of(stage)
    given = stage.reference is not None and "mode" in stage.reference.model_fields_set
    source = f"{stage.path}.reference.mode" if given else "default (reference.mode: auto)"
    yield Setting("precompute_ref_log_probs", precomputes(stage), source)
    if reference.update_every is not None and stage.lora is None:
        source = f"{stage.path}.reference.update_every"
        yield Setting("sync_ref_model", True, source)
        yield Setting("ref_model_sync_steps", reference.update_every, source)
        yield Setting("ref_model_mixup_alpha", 1.0, source)
    if stage.lora is not None:
        keeps = stage.lora.dropout > 0
        reason = "lora.dropout would be switched off" if keeps else "default of TRL"
        yield Setting("disable_dropout", not keeps, reason)


def reference_problems(stage: "TrainingStage") -> Iterable[Problem]:
    """Combinations of reference, adapter and update that cannot be."""
    reference = reference_of(stage)
    for key, owner in OWNED.items():
        if key in stage.trl:
            yield Problem(f"trl.{key}", f"belongs to {owner}")
    if reference.mode == "copy" and stage.lora is not None:
        yield Problem(
            "reference.mode",
            "'copy' would hold a second model beside an adapter whose base is already the reference; "
            "use auto, or drop lora",
        )
    if reference.mode in {"base", "adapter"} and stage.lora is None:
        yield Problem("reference.mode", f"{reference.mode!r} needs lora; without it use auto or copy")
    if reference.update_every is not None and reference.mode in {"precompute", "none", "base"}:
        yield Problem(
            "reference.update_every", f"has no effect with reference.mode {reference.mode!r}; use auto or copy"
        )


def reference_callbacks(job: "Job") -> dict[str, Any]:
    """What keeps an updated reference right: the copy of the adapter, or the reference in the checkpoints."""
    every = reference_of(job.stage).update_every
    if every is None:
        return {}
    from stagekit.trainers.reference import ReferenceAdapterUpdate, ReferenceModelCheckpoint

    if job.stage.lora is not None:
        return {"reference": ReferenceAdapterUpdate(every)}
    from stagekit.callbacks import last_checkpoint

    resume = last_checkpoint(job.checkpoints)
    return {"reference": ReferenceModelCheckpoint(str(resume) if resume is not None else None)}


def reference_built(job: "Job", trainer: Any) -> None:
    """`base` drops TRL's frozen copy of the incoming adapter, so that the reference is the model without any; `none`
    drops it because nothing reads it."""
    if reference_of(job.stage).mode in {"base", "none"} and "ref" in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter("ref")


def cache_arguments(job: "Job") -> dict[str, Any]:
    """Where precomputed reference log-probabilities are kept, and under which model's name."""
    if not precomputes(job.stage) or reference_of(job.stage).mode == "none" or job.model is None:
        return {}
    from stagekit.convert import cache_folder
    from stagekit.fingerprints import model_fingerprint

    key = f"{model_fingerprint(job.model.base)} {model_fingerprint(job.model.adapter) if job.model.adapter else ''}"
    return {"cache_dir": str(cache_folder() / "reference"), "cache_key": key}
