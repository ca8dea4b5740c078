"""Rejection sampling: a model answers prompts several times, learns the best answers, prefers them to the worst.

Stage `raft` fine-tunes on the best of n by reward; stage `prefer` is DPO on the best against the worst answer, as RSO
does it. Source: huggingface.co/papers/2304.06767 and huggingface.co/papers/2309.06657.

    python -m stagekit.recipes.rejection_sampling
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagekit.adapters.dpo import DPO
from stagekit.adapters.rejection_sampling import RejectionSampling
from stagekit.groups import Generation, LoRA
from stagekit.pipeline import TrainingPipeline
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import HARMLESS, SMOLLM2
from stagekit.stage import TrainingStage


BRIEF = "stagekit.recipes.rejection_sampling:brief"


def brief(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A toy reward in (0, 1]: the fewer words an answer has, the better; half of it for one without a full stop."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    ended = [1.0 if text.rstrip().endswith((".", "!", "?")) else 0.5 for text in texts]
    return [full / (1 + len(text.split()) / 20) for full, text in zip(ended, texts, strict=True)]


def pipeline(
    model: Any = SMOLLM2,
    prompts: Any = HARMLESS,
    reward: Any = BRIEF,
    n: int = 8,
    max_prompts: int | None = 32,
    output_dir: str | Path = "runs/rejection-sampling",
) -> TrainingPipeline:
    """The rejection sampling pipeline.

    Args:
        model: Where to start: a path, a hub id, a GGUF file, or a live model. It needs a chat template.
        prompts: Rows with `prompt`; a reward function sees their other columns.
        reward: A function, a reward model, or a list of them with weights.
        n: Answers per prompt.
        max_prompts: Prompts at most. None = as many as there are.
        output_dir: The run folder.
    """
    shared: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 4,
        "use_mixed_precision": True,
        "mixed_precision_dtype": "bf16",
        "logging_steps": 2,
        "trl": {"max_length": 512},
    }
    raft = TrainingStage(
        name="raft",
        description="answer n times, learn the best",
        method=RejectionSampling(reward=reward, n=n),
        training_data=prompts,
        generation=Generation(max_new_tokens=128),
        lora=LoRA(rank=16, alpha=32, dropout=0.05),
        **({"max_training_samples": max_prompts} if max_prompts is not None else {}),
        **shared,
    )
    prefer = TrainingStage(
        name="prefer",
        description="prefer the best answer to the worst",
        method=DPO(beta=0.1),
        training_data="stage:raft/preferences",
        lora=LoRA(rank=16, alpha=32, dropout=0.05, merge=True),
        **shared,
    )
    return TrainingPipeline(name="rejection-sampling", model=model, output_dir=Path(output_dir), stages=(raft, prefer))


if __name__ == "__main__":
    sys.exit(launch(pipeline, "rejection_sampling", "Rejection sampling on a small model with a toy reward."))
