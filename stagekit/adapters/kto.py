"""KTO: preference optimisation from single answers labelled good or bad; TRL's KTOTrainer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Method, Setting, in_effect, setting
from stagekit.adapters.references import (
    REPORTS,
    reference_built,
    reference_callbacks,
    reference_of,
    reference_problems,
    reference_settings,
)
from stagekit.errors import Problem
from stagekit.options import NonNegativeFloat, PositiveFloat


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class KTO(Method):
    """Preference optimisation from single answers labelled good or bad; pairs are taken apart."""

    type: Literal["kto"] = "kto"
    """The stage type."""

    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference. TRL: `beta`."""

    desirable_weight: NonNegativeFloat = 1.0
    """Weight of the good answers. TRL: `desirable_weight`."""

    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of the bad answers. TRL: `undesirable_weight`."""

    summary: ClassVar = "preference optimisation from answers labelled good or bad"
    paper: ClassVar = "huggingface.co/papers/2402.01306"
    trainer_class: ClassVar = "trl:KTOTrainer"
    config_class: ClassVar = "trl:KTOConfig"
    default_learning_rate: ClassVar = 1e-6
    slots: ClassVar = frozenset({"model", "lora", "reference", "text_metrics", "trl"})
    reports: ClassVar = REPORTS | {"kl"}
    columns: ClassVar = (("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected"))

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The loss and its reference. Batches stay as laid out, or their estimate of the divergence is wrong."""
        yield Setting("loss_type", "kto", "stagekit")
        yield setting(stage, "beta", "beta", self.beta)
        yield setting(stage, "desirable_weight", "desirable_weight", self.desirable_weight)
        yield setting(stage, "undesirable_weight", "undesirable_weight", self.undesirable_weight)
        yield Setting("train_sampling_strategy", "sequential", "stagekit (rows are shuffled once, before)")
        yield from reference_settings(stage)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """A batch of one has no other row to estimate the divergence from."""
        if stage.batch_size < 2:
            yield Problem("batch_size", "kto estimates a divergence over the batch; it must be at least 2")
        if reference_of(stage).mode == "none":
            yield Problem(
                "reference.mode", "'none' cannot be with kto, which compares with a reference; use simpo or orpo"
            )
        yield from reference_problems(stage)

    def rows(self, job: "Job", dataset: Any) -> Any:
        """Pairs taken apart so that every batch has good and bad ones; in an order that the seed decides, or in the
        data's with `shuffle_data: false`."""
        if dataset is None:
            return None
        from stagekit.trainers.preference import kto_rows

        stage = job.stage
        seed = stage.random_seed if stage.data_shuffle_seed is None else stage.data_shuffle_seed
        return kto_rows(dataset, seed if stage.shuffle_data else None)

    def callbacks(self, job: "Job") -> dict[str, Any]:
        """Those that update the reference."""
        return reference_callbacks(job)

    def built(self, job: "Job", trainer: Any) -> None:
        """The reference as declared."""
        reference_built(job, trainer)

    def step0_loss(self, stage: "TrainingStage") -> float | None:
        """At policy == reference every row's loss is its weight times 1 - sigmoid(0)."""
        good, bad = (in_effect(stage, side, side) for side in ("desirable_weight", "undesirable_weight"))
        if reference_of(stage).mode == "base" or good != bad:
            return None
        return 0.5 * float(good)
