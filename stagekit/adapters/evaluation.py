"""Measure a model on data, change nothing."""

from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.base import Method
from stagekit.stage_options import (
    CallbackOptions,
    DataOptions,
    EvaluationOptions,
    Identity,
    Loop,
    PrecisionOptions,
)


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome


NO_TRAINING = "an evaluation stage does not train; put it on the stage that does"


class Evaluation(Method):
    """Loss, perplexity, accuracy and your own metrics of the incoming model on `validation_data`."""

    type: Literal["evaluation"] = "evaluation"
    """The stage type."""

    summary: ClassVar = "measure the incoming model on data; the model is passed on unchanged"
    trainer_class: ClassVar = "trl:SFTTrainer"
    config_class: ClassVar = "trl:SFTConfig"
    families: ClassVar = frozenset({Identity, DataOptions, Loop, PrecisionOptions, EvaluationOptions, CallbackOptions})
    slots: ClassVar = frozenset({"model", "text_metrics", "trl"})
    instead: ClassVar = NO_TRAINING
    refused: ClassVar = {
        **dict.fromkeys(
            ("epochs", "max_steps", "gradient_accumulation_steps", "use_gradient_checkpointing", "max_gradient_norm",
             "custom_loss_function", "max_duration", "evaluation_steps", "is_evaluation_only"),
            NO_TRAINING,
        ),
        "training_data": "an evaluation stage measures validation_data; put the data there",
        **dict.fromkeys(
            ("data_mixing_ratios", "shuffle_data", "data_shuffle_seed", "max_training_samples"),
            "an evaluation stage measures every row of validation_data as it is",
        ),
    }  # fmt: skip
    columns: ClassVar = (("messages",), ("prompt", "completion"), ("text",), ("conversations",), ("input_ids",))
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_mean_token_accuracy", "custom": ""}
    perplexity: ClassVar = True
    trains: ClassVar = False
    needs_data: ClassVar = False

    def run(self, job: "Job") -> "Outcome":
        """Evaluate; nothing is saved but the metrics."""
        from stagekit.training import evaluate

        return evaluate(job)
