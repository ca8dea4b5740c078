"""Supervised fine-tuning: TRL's SFTTrainer."""

from typing import ClassVar, Literal

from stagekit.adapters.base import Method


class SFT(Method):
    """Supervised fine-tuning: learn to give the completions of the data."""

    type: Literal["sft"] = "sft"
    """The stage type."""

    summary: ClassVar = "supervised fine-tuning on text, messages or prompt and completion"
    trainer_class: ClassVar = "trl:SFTTrainer"
    config_class: ClassVar = "trl:SFTConfig"
    default_learning_rate: ClassVar = 2e-5
    slots: ClassVar = frozenset({"model", "lora", "text_metrics", "trl"})
    columns: ClassVar = (("messages",), ("prompt", "completion"), ("text",), ("conversations",), ("input_ids",))
    metric_keys: ClassVar = {
        "loss": "eval_loss",
        "accuracy": "eval_mean_token_accuracy",
        "perplexity": "eval_perplexity",
        "custom": "",
    }
    reports: ClassVar = frozenset({"entropy", "aux_loss"})
    perplexity: ClassVar = True
    takes_loss: ClassVar = True
