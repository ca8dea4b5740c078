"""Direct preference optimisation: TRL's DPOTrainer with the losses sigmoid, hinge and ipo."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.base import Method, Setting, setting
from stagekit.errors import Problem
from stagekit.options import Fraction, NonNegativeFloat, PositiveFloat


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


DPOLoss = Literal["sigmoid", "hinge", "ipo", "robust", "conservative", "exo", "nca", "apo", "sppo", "aot", "discopop"]


_OWNED = {
    "loss_type": "method.loss",
    "loss_weights": "method.loss",
    "precompute_ref_log_probs": "reference.mode",
    "sync_ref_model": "reference.update_every",
}
"""Arguments that change what stagekit must know of the loss and the reference."""


class DPO(Method):
    """Direct preference optimisation: prefer `chosen` to `rejected`, measured against a reference model."""

    type: Literal["dpo"] = "dpo"
    """The stage type."""

    loss: DPOLoss = "sigmoid"
    """Which loss of the margin x = beta * (policy's log-ratio - reference's log-ratio): sigmoid is -log sigmoid(x),
    hinge max(0, 1 - x), ipo the squared distance to 1/(2 beta) of the length-averaged ratio. TRL: `loss_type`."""

    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference, 0.01 to 0.5; tau for ipo. TRL: `beta`."""

    label_smoothing: Fraction = 0.0
    """Assumed share of wrongly ordered pairs; for the robust and conservative losses."""

    margin: NonNegativeFloat = 0.0
    """Margin that the hinge loss asks for."""

    summary: ClassVar = "direct preference optimisation against a reference model"
    paper: ClassVar = "huggingface.co/papers/2305.18290"
    trainer_class: ClassVar = "trl:DPOTrainer"
    config_class: ClassVar = "trl:DPOConfig"
    default_learning_rate: ClassVar = 1e-6
    slots: ClassVar = frozenset({"model", "lora", "reference", "trl"})
    columns: ClassVar = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "custom": ""}

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The loss, its strength, and how the reference is kept."""
        yield setting(stage, "loss", "loss_type", [self.loss])
        yield setting(stage, "beta", "beta", self.beta)
        mode = stage.reference.mode if stage.reference else "auto"
        precompute = mode == "precompute" or (mode == "auto" and stage.lora is None)
        given = stage.reference is not None and "mode" in stage.reference.model_fields_set
        source = f"{stage.path}.reference.mode" if given else "default (reference.mode: auto)"
        yield Setting("precompute_ref_log_probs", precompute, source)
        if stage.lora is not None:
            keeps = stage.lora.dropout > 0
            reason = "lora.dropout would be switched off" if keeps else "default of TRL"
            yield Setting("disable_dropout", not keeps, reason)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Options that the chosen loss does not read, and reference modes that cannot be."""
        if self.label_smoothing > 0 and self.loss in {"sigmoid", "hinge", "ipo"}:
            yield Problem(
                "method.label_smoothing",
                f"{self.label_smoothing} has no effect on the loss {self.loss!r}; use conservative (cDPO) or robust",
            )
        if self.margin > 0 and self.loss != "hinge":
            yield Problem("method.margin", f"{self.margin} has no effect on the loss {self.loss!r}; use loss: hinge")
        for key, owner in _OWNED.items():
            if key in stage.trl:
                yield Problem(f"trl.{key}", f"belongs to {owner}")
        if stage.reference is not None and stage.reference.mode == "copy" and stage.lora is not None:
            yield Problem(
                "reference.mode",
                "'copy' would hold a second model beside an adapter whose base is already the reference; "
                "use auto, or drop lora",
            )

    def step0_loss(self) -> float | None:
        """At policy == reference the margin x is 0: ln 2, 1, or 1 / (2 beta)^2."""
        at_zero = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * self.beta) ** 2}
        return at_zero.get(self.loss)
