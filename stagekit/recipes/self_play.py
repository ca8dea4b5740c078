"""Self-play fine-tuning (SPIN): a model learns to prefer the data's answers to its own, and needs no preferences.

Stage `sft` learns the demonstrations; stage `spin` answers the same prompts and prefers the demonstrations to its
own answers, twice, each time against the model of the iteration before. `before` and `after` measure the loss on
demonstrations that neither has seen. Source: huggingface.co/papers/2401.01335.

    python -m stagekit.recipes.self_play
"""

import sys
from pathlib import Path
from typing import Any

from stagekit.adapters.self_play import SelfPlay
from stagekit.groups import Generation, LoRA
from stagekit.pipeline import TrainingPipeline
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import SMOLLM2, SUMS, SUMS_HELD_OUT
from stagekit.stage import TrainingStage


def pipeline(
    model: Any = SMOLLM2,
    data: Any = SUMS,
    held_out: Any = SUMS_HELD_OUT,
    iterations: int = 2,
    max_rows: int | None = 64,
    output_dir: str | Path = "runs/self-play",
) -> TrainingPipeline:
    """The self-play pipeline.

    Args:
        model: Where to start: a path, a hub id, a GGUF file, or a live model. It needs a chat template.
        data: Demonstrations: rows with `prompt` and `completion`.
        held_out: Rows of the same kind, to measure on.
        iterations: Times of answering and preferring.
        max_rows: Demonstrations at most, in each of the two stages. None = as many as there are.
        output_dir: The run folder.
    """
    shared: dict[str, Any] = {
        "training_data": data,
        "batch_size": 8,
        "use_mixed_precision": True,
        "mixed_precision_dtype": "bf16",
        "logging_steps": 2,
        "trl": {"max_length": 256},
        **({"max_training_samples": max_rows} if max_rows is not None else {}),
    }
    measured: dict[str, Any] = {"method": "evaluation", "validation_data": held_out}
    sft = TrainingStage(
        name="sft",
        description="learn the demonstrations",
        lora=LoRA(rank=16, alpha=32, dropout=0.0),
        epochs=2,
        **shared,
    )
    spin = TrainingStage(
        name="spin",
        description="prefer the demonstrations to the model's own answers",
        method=SelfPlay(iterations=iterations, responses_per_prompt=2),
        generation=Generation(max_new_tokens=48),
        lora=LoRA(rank=16, alpha=32, dropout=0.0),
        learning_rate=5e-5,
        epochs=1,
        **shared,
    )
    before = TrainingStage(name="before", description="measure the start of self-play", **measured)
    after = TrainingStage(name="after", description="measure the end of self-play", **measured)
    return TrainingPipeline(
        name="self-play", model=model, output_dir=Path(output_dir), stages=(sft, before, spin, after)
    )


def last_turn(dataset: Any, split: str) -> Any:
    """A `data_preprocessor` for chats (rows with `messages`): the last answer as the completion, all before it as the
    prompt. Chats that do not end with an answer are left out."""
    ended = dataset.filter(lambda row: len(row["messages"]) > 1 and row["messages"][-1]["role"] == "assistant")
    return ended.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=dataset.column_names,
    )


if __name__ == "__main__":
    sys.exit(launch(pipeline, "self_play", "Self-play fine-tuning (SPIN) of a small model on sums."))
