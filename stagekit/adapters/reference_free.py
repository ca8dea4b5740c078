"""Preference optimisation without a reference: ORPO, CPO, SimPO. Small subclasses of TRL's stable DPOTrainer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Method, Setting, in_effect, setting
from stagekit.adapters.references import OWNED, REPORTS
from stagekit.errors import Problem
from stagekit.options import Fraction, NonNegativeFloat, PositiveFloat


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class ReferenceFree(Method):
    """What the three share."""

    config_class: ClassVar = "trl:DPOConfig"
    trainer_class: ClassVar = "stagekit.trainers.preference:ReferenceFreeDPOTrainer"
    default_learning_rate: ClassVar = 1e-6
    slots: ClassVar = frozenset({"model", "lora", "text_metrics", "trl"})
    columns: ClassVar = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "custom": ""}
    reports: ClassVar = REPORTS | {"mean_token_accuracy"}

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The reference's columns are constants, so no reference model is ever loaded."""
        yield setting(stage, "beta", "beta", self.beta)  # type: ignore[attr-defined]
        yield Setting("precompute_ref_log_probs", True, "stagekit (there is no reference)")
        if stage.lora is not None:
            yield Setting("disable_dropout", stage.lora.dropout == 0, "lora.dropout would be switched off")

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Arguments that would make another loss of it."""
        for key in OWNED:
            if key in stage.trl:
                yield Problem(f"trl.{key}", f"belongs to {self.type}, whose loss is fixed")  # type: ignore[attr-defined]

    def built(self, job: "Job", trainer: Any) -> None:
        """TRL copies an incoming adapter as a reference; nothing here reads it."""
        if "ref" in getattr(trainer.model, "peft_config", {}):
            trainer.model.delete_adapter("ref")


class ORPO(ReferenceFree):
    """Odds-ratio preference optimisation: likelihood of `chosen`, plus lambda times the log odds ratio."""

    type: Literal["orpo"] = "orpo"
    """The stage type."""

    beta: PositiveFloat = 0.1
    """Weight of the odds-ratio term, the paper's lambda. TRL: `beta`."""

    summary: ClassVar = "odds-ratio preference optimisation, no reference"
    paper: ClassVar = "huggingface.co/papers/2403.07691"
    trainer_class: ClassVar = "stagekit.trainers.preference:ORPOTrainer"
    reports: ClassVar = frozenset(name for name in REPORTS if name.startswith(("rewards/", "logps/"))) | {
        "nll_loss",
        "log_odds_chosen",
        "log_odds_ratio",
    }


class CPO(ReferenceFree):
    """Contrastive preference optimisation: -log sigmoid(beta (log p(chosen) - log p(rejected)) - margin), plus the
    likelihood of `chosen`."""

    type: Literal["cpo"] = "cpo"
    """The stage type."""

    beta: PositiveFloat = 0.1
    """Strength of the contrast. TRL: `beta`."""

    margin: NonNegativeFloat = 0.0
    """Margin that the chosen answer must win by."""

    label_smoothing: Fraction = 0.0
    """Assumed share of wrongly ordered pairs, below 0.5."""

    likelihood_weight: NonNegativeFloat = 1.0
    """Weight of the likelihood of `chosen`, the paper's and TRL's alpha."""

    summary: ClassVar = "contrastive preference optimisation, no reference"
    paper: ClassVar = "huggingface.co/papers/2401.08417"

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The contrast, smoothed as cDPO is, and the likelihood."""
        yield from super().settings(stage)
        e = self.label_smoothing
        names, weights = (["sigmoid", "robust"], [2 * (1 - e), -(1 - 2 * e)]) if e > 0 else (["sigmoid"], [1.0])
        if self.likelihood_weight > 0:
            names, weights = [*names, "sft"], [*weights, self.likelihood_weight]
        yield Setting("loss_type", names, "stagekit (cpo)")
        yield setting(stage, "likelihood_weight", "loss_weights", weights)
        if e > 0:
            yield setting(stage, "label_smoothing", "label_smoothing", e)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """A smoothing that turns the preference around."""
        if self.label_smoothing >= 0.5:
            yield Problem("method.label_smoothing", f"{self.label_smoothing} must be below 0.5")
        yield from super().problems(stage)

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """The margin."""
        return {"margin": self.margin} if self.margin > 0 else {}


class SimPO(ReferenceFree):
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - margin), means over the tokens of an answer."""

    type: Literal["simpo"] = "simpo"
    """The stage type."""

    beta: PositiveFloat = 0.1
    """Scale of the averaged log-probabilities. The paper uses 2 to 2.5; the specification's 0.1 hardly trains.
    TRL: `beta`."""

    margin: NonNegativeFloat = 0.0
    """The paper's gamma, in the unit of the rewards; 0.5 to 1.5 is usual."""

    summary: ClassVar = "preference optimisation on length-averaged log-probabilities, no reference"
    paper: ClassVar = "huggingface.co/papers/2405.14734"

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The length-averaged loss."""
        yield from super().settings(stage)
        yield Setting("loss_type", ["sigmoid_norm"], "stagekit (simpo)")

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """The margin."""
        return {"margin": self.margin} if self.margin > 0 else {}

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """A beta at which nothing happens."""
        beta = in_effect(stage, "beta", "beta")
        if beta < 0.5:
            yield f"beta {beta:g} is far below the paper's 2 to 2.5; averaged log-probabilities are small numbers"
