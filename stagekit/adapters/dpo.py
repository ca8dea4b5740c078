"""Direct preference optimisation: TRL's DPOTrainer with its losses, margins, soft labels and references."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Method, Setting, in_effect, setting
from stagekit.adapters.references import (
    REPORTS,
    cache_arguments,
    precomputes,
    reference_built,
    reference_callbacks,
    reference_of,
    reference_problems,
    reference_settings,
)
from stagekit.errors import Problem
from stagekit.options import Fraction, NonNegativeFloat, PositiveFloat


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


DPOLoss = Literal[
    "sigmoid", "hinge", "ipo", "robust", "conservative", "exo", "nca", "apo", "apo_down", "sppo", "aot", "discopop"
]

_TRL_NAMES = {"exo": "exo_pair", "nca": "nca_pair", "apo": "apo_zero", "sppo": "sppo_hard"}
_SMOOTHED = {"robust", "conservative", "exo", "aot"}
_WITH_MARGIN = {"sigmoid", "hinge", "robust", "conservative"}
_REFERENCE_FREE = {"sigmoid", "hinge", "ipo"}


class DPO(Method):
    """Direct preference optimisation: prefer `chosen` to `rejected`, measured against a reference model."""

    type: Literal["dpo"] = "dpo"
    """The stage type."""

    loss: DPOLoss = "sigmoid"
    """Which loss of the margin x = beta * (policy's log-ratio - reference's log-ratio): sigmoid is -log sigmoid(x),
    hinge max(0, 1 - x), ipo the squared distance to 1/(2 beta) of the length-averaged ratio; robust and conservative
    (cDPO) for noisy labels; exo, nca, apo (and apo_down), sppo, aot, discopop as in TRL. TRL: `loss_type`."""

    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference, 0.01 to 0.5; tau for ipo. TRL: `beta`."""

    label_smoothing: Fraction = 0.0
    """Assumed share of wrongly ordered pairs, below 0.5; for the losses robust, conservative, exo and aot, and with
    `soft_labels` for rows without a probability."""

    margin: NonNegativeFloat | None = None
    """Margin that x must reach, in the unit of the logged rewards: hinge becomes max(0, margin - x), the others use
    x - margin. For sigmoid, hinge, robust and conservative. None = the loss's own (1 for hinge, else 0)."""

    mix: Mapping[str, PositiveFloat] = {}
    """More of TRL's losses beside `loss` (weight 1), with their weights: `{sft: 0.2}`. TRL: `loss_weights`."""

    soft_labels: bool = False
    """Read a column `chosen_prob`, the probability that `chosen` is really better:
    -p log sigmoid(x) - (1 - p) log sigmoid(-x)."""

    summary: ClassVar = "direct preference optimisation against a reference model"
    paper: ClassVar = "huggingface.co/papers/2305.18290"
    trainer_class: ClassVar = "trl:DPOTrainer"
    config_class: ClassVar = "trl:DPOConfig"
    default_learning_rate: ClassVar = 1e-6
    slots: ClassVar = frozenset({"model", "lora", "reference", "text_metrics", "trl"})
    columns: ClassVar = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    optional_columns: ClassVar = ("chosen_prob",)
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "custom": ""}
    reports: ClassVar = REPORTS | {"mean_token_accuracy"}

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The loss, its strength, and how the reference is kept."""
        names, weights = self._losses()
        yield setting(stage, "loss", "loss_type", names)
        if weights is not None:
            yield setting(stage, "mix" if self.mix else "loss", "loss_weights", weights)
        yield setting(stage, "beta", "beta", self.beta)
        if self.loss in _SMOOTHED or self.soft_labels:
            yield setting(stage, "label_smoothing", "label_smoothing", self.label_smoothing)
        yield from reference_settings(stage)

    def _losses(self) -> tuple[list[str], list[float] | None]:
        """TRL's losses and weights. TRL has no cDPO, but it is exactly 2 (1 - e) sigmoid - (1 - 2 e) robust."""
        e = self.label_smoothing
        if self.loss == "conservative":
            names, weights = ["sigmoid", "robust"], [2 * (1 - e), -(1 - 2 * e)]
        else:
            names, weights = [_TRL_NAMES.get(self.loss, self.loss)], [1.0]
        names += list(self.mix)
        weights += list(self.mix.values())
        return names, weights if len(names) > 1 else None

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Options that the chosen loss does not read, and combinations that no trainer has."""
        e, free = self.label_smoothing, reference_of(stage).mode == "none"
        if e > 0 and self.loss not in _SMOOTHED and not self.soft_labels:
            yield Problem(
                "method.label_smoothing",
                f"{e} has no effect on the loss {self.loss!r}; use conservative (cDPO) or robust",
            )
        if e >= 0.5:
            yield Problem(
                "method.label_smoothing", f"{e} says that pairs are rather wrong than right; it is below 0.5"
            )
        if e == 0 and self.loss in {"robust", "conservative", "exo"}:
            instead = "" if self.loss == "exo" else "; without it this is sigmoid"
            yield Problem("method.label_smoothing", f"the loss {self.loss!r} needs it above 0{instead}")
        if self.margin is not None and self.loss not in _WITH_MARGIN:
            yield Problem("method.margin", f"has no effect on the loss {self.loss!r}; use hinge or sigmoid")
        if self.margin == 0 and self.loss == "hinge" and not free:
            yield Problem("method.margin", "0 with hinge never trains: at the reference its gradient is 0")
        if self.soft_labels and (self.loss != "sigmoid" or self.margin is not None or self.mix):
            yield Problem("method.soft_labels", "goes with loss: sigmoid alone, without margin and mix")
        if free and (self.loss not in _REFERENCE_FREE or self.soft_labels or self.mix):
            yield Problem(
                "reference.mode", "'none' goes with the losses sigmoid, hinge and ipo alone; or use cpo, simpo, orpo"
            )
        yield from reference_problems(stage)

    def trainer_for(self, stage: "TrainingStage") -> str:
        """TRL's trainer, or the small subclass that the options need."""
        home = "stagekit.trainers.preference"
        if reference_of(stage).mode == "none":
            return f"{home}:ReferenceFreeDPOTrainer"
        if self.soft_labels:
            return f"{home}:SoftLabelDPOTrainer"
        if self.margin is not None:
            return f"{home}:MarginDPOTrainer"
        return "stagekit.trainers.reference:CachedReferenceDPOTrainer" if precomputes(stage) else "trl:DPOTrainer"

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """The margin, and where precomputed log-probabilities are kept."""
        margin = {"margin": self.margin} if self.margin is not None else {}
        return {**margin, **cache_arguments(job)}

    def callbacks(self, job: "Job") -> dict[str, Any]:
        """Those that update the reference."""
        return reference_callbacks(job)

    def built(self, job: "Job", trainer: Any) -> None:
        """The reference as declared."""
        reference_built(job, trainer)

    def step0_loss(self, stage: "TrainingStage") -> float | None:
        """The loss at x = 0, in closed form; None without a reference, with `base`, or in a mix."""
        if reference_of(stage).mode in {"none", "base"} or self.mix:
            return None
        e, m, ln2 = self.label_smoothing, self.margin, math.log(2)
        beta = in_effect(stage, "beta", "beta")
        if self.loss == "hinge":
            return 1.0 if m is None else m
        wrong, right = math.log1p(math.exp(m or 0.0)), math.log1p(math.exp(-(m or 0.0)))
        at_zero = {
            "sigmoid": wrong,
            "conservative": (1 - e) * wrong + e * right,
            "ipo": 1 / (2 * beta) ** 2,
            "nca": 2 * ln2,
            "apo": 1.0,
            "apo_down": 1.0,
            "sppo": 0.5 / beta**2,
            "aot": ln2,
        }
        if self.loss == "robust":
            return ((1 - e) * wrong - e * right) / (1 - 2 * e)
        if self.loss == "exo":
            return -ln2 - 0.5 * (math.log(1 - e) + math.log(e))
        return at_zero.get(self.loss)
