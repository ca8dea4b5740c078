"""A teacher that knows nothing: the teacher's shape with random weights, the control of distillation."""

from typing import TYPE_CHECKING, Any

from benchmarks.world import tokenizer as words
from benchmarks.world.base import TEACHER, new_model


if TYPE_CHECKING:
    from stagekit.job import CustomContext


def make(context: "CustomContext") -> dict[str, Any]:
    """The function of a custom stage: the policy is a random model with the world's tokenizer."""
    folder, tokenizer = context.output_dir / "policy", words.build()
    new_model(tokenizer, TEACHER, context.seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"policy": str(folder)}
