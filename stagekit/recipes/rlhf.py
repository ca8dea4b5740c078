"""Reinforcement learning from human feedback in InstructGPT's three steps: demonstrations, a reward model, PPO.

Stage `sft` learns from demonstrations, `reward` learns which of two answers is better, `ppo` learns from its scores
with a penalty for leaving the SFT model. The pairs prefer an answer of exactly three lines with a dash; how many
held-out answers have that form is measured beside the score (`rewards/form/mean`), and rewards nothing.
Source: huggingface.co/papers/2203.02155.

    python -m stagekit.recipes.rlhf
"""

import sys
from pathlib import Path
from typing import Any

from stagekit.adapters.ppo import PPO
from stagekit.adapters.reward import Reward
from stagekit.groups import Generation, LoRA, RewardSource
from stagekit.pipeline import TrainingPipeline
from stagekit.recipes.held_out import show
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import LIST, LISTS_HELD_OUT, LISTS_PAIRS, LISTS_PROMPTS, LISTS_SHOWN, SMOLLM2
from stagekit.stage import TrainingStage


def pipeline(
    model: Any = SMOLLM2,
    demonstrations: Any = LISTS_SHOWN,
    pairs: Any = LISTS_PAIRS,
    prompts: Any = LISTS_PROMPTS,
    held_out: Any = LISTS_HELD_OUT,
    output_dir: str | Path = "runs/rlhf",
) -> TrainingPipeline:
    """SFT, a reward model, PPO.

    Args:
        model: Where to start: a path, a hub id, a GGUF file, or a live model. It needs a chat template.
        demonstrations: Rows with `prompt` and `completion`.
        pairs: Rows with `prompt`, `chosen` and `rejected`.
        prompts: Rows with `prompt`.
        held_out: Rows with `prompt`, to measure on before training and after.
        output_dir: The run folder.
    """
    shape: dict[str, Any] = {"rank": 16, "alpha": 32, "target_modules": "all-linear"}
    cut = {"max_length": 256}
    sft = TrainingStage(
        name="sft",
        description="learn from demonstrations",
        training_data=demonstrations,
        epochs=4,
        batch_size=4,
        learning_rate=5e-4,
        lora=LoRA(**shape),
        logging_steps=4,
        trl=cut,
    )
    reward = TrainingStage(
        name="reward",
        description="learn which of two answers is better",
        method=Reward(center_rewards=0.01),
        training_data=pairs,
        epochs=1,
        batch_size=8,
        learning_rate=3e-4,
        use_mixed_precision=True,
        mixed_precision_dtype="bf16",
        lora=LoRA(**shape),
        logging_steps=4,
        trl=cut,
    )
    stages = (sft, reward, _ppo(prompts, held_out, shape))
    return TrainingPipeline(name="rlhf", model=model, output_dir=Path(output_dir), stages=stages)


def _ppo(prompts: Any, held_out: Any, shape: dict[str, Any]) -> TrainingStage:
    """PPO on the reward model's score; the form is measured beside it."""
    form = RewardSource("regex", name="form", weight=0.0, options={"pattern": LIST, "whole": True})
    return TrainingStage(
        name="ppo",
        description="learn from the reward model's scores",
        method=PPO(
            reward=(RewardSource("stage:reward"), form), rollout_samples=32, epochs_per_batch=2, value_clip_range=None,
            missing_eos_penalty=1.0, kl_penalty_coefficient=0.02),
        training_data=prompts,
        validation_data=held_out,
        evaluation_steps=40, early_stopping=None,
        generation=Generation(max_new_tokens=40),
        lora=LoRA(**shape, merge=True),
        learning_rate=3e-4,
        use_mixed_precision=True, mixed_precision_dtype="bf16",
        epochs=1, max_steps=40,
        batch_size=16,
        logging_steps=1,
        checkpoint_save_steps=20,
        trl={"eval_on_start": True},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(launch(pipeline, "rlhf", "SFT, a reward model and PPO on a small model.", after=show))
