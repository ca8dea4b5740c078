"""Reinforcement learning with a verifiable reward: a model learns a format by being checked, not by being shown.

Stage `sft` shows lists of three in several forms; stage `grpo` rewards an answer that is exactly three lines with a
dash, which a regular expression decides. `eval_rewards/regex/mean` is the share of held-out answers that meet it.
Source: huggingface.co/papers/2411.15124, section 6, with GRPO (huggingface.co/papers/2402.03300) in the place of PPO.

    python -m stagekit.recipes.rlvr
"""

import sys
from pathlib import Path
from typing import Any

from stagekit.adapters.grpo import GRPO
from stagekit.groups import Generation, LoRA, RewardSource
from stagekit.pipeline import TrainingPipeline
from stagekit.recipes.held_out import show
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import LIST, LISTS_HELD_OUT, LISTS_PROMPTS, LISTS_SHOWN, SMOLLM2
from stagekit.stage import TrainingStage


def pipeline(
    model: Any = SMOLLM2,
    shown: Any = LISTS_SHOWN,
    prompts: Any = LISTS_PROMPTS,
    held_out: Any = LISTS_HELD_OUT,
    reward: Any = None,
    output_dir: str | Path = "runs/rlvr",
) -> TrainingPipeline:
    """SFT, then GRPO with a verifier.

    Args:
        model: Where to start: a path, a hub id, a GGUF file, or a live model. It needs a chat template.
        shown: Rows with `prompt` and `completion`.
        prompts: Rows with `prompt`, and the columns that the reward reads.
        held_out: Rows as `prompts`, to measure on before training and after.
        reward: What checks an answer. None = the rule above.
        output_dir: The run folder.
    """
    adapter = {"rank": 16, "alpha": 32, "target_modules": "all-linear"}
    rule = RewardSource("regex", options={"pattern": LIST, "whole": True})
    sft = TrainingStage(
        name="sft",
        description="see lists of three, some in the wanted form",
        training_data=shown,
        epochs=4,
        batch_size=4,
        learning_rate=5e-4,
        lora=LoRA(**adapter),
        logging_steps=4,
        trl={"max_length": 256},
    )
    grpo = TrainingStage(
        name="grpo",
        description="learn the form from a check",
        method=GRPO(reward=reward if reward is not None else rule, group_size=8),
        training_data=prompts,
        validation_data=held_out,
        evaluation_steps=20,
        early_stopping=None,
        generation=Generation(max_new_tokens=40),
        lora=LoRA(**adapter, merge=True),
        learning_rate=3e-4,
        epochs=1,
        max_steps=20,
        batch_size=16,
        logging_steps=1,
        checkpoint_save_steps=10,
        use_mixed_precision=True,
        mixed_precision_dtype="bf16",
        trl={"eval_on_start": True},
    )
    return TrainingPipeline(name="rlvr", model=model, output_dir=Path(output_dir), stages=(sft, grpo))


if __name__ == "__main__":
    sys.exit(launch(pipeline, "rlvr", "SFT, then GRPO with a verifiable format rule, on a small model.", after=show))
