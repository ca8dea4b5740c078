"""Constitutional AI: a model answers red-team prompts, criticises and revises its answers, and learns to prefer them.

Stage `sl-cai` fine-tunes on the revisions (and on unrevised answers to harmless prompts, against over-refusal); stage
`rl-cai` prefers the last revision to the first answer with DPO. Source: huggingface.co/papers/2212.08073, with DPO in
the place of RL, as open recipes do it.

    python -m stagekit.recipes.cai
"""

import sys
from pathlib import Path
from typing import Any

from stagekit.adapters.constitutional import Constitutional
from stagekit.adapters.dpo import DPO
from stagekit.groups import Generation, LoRA
from stagekit.pipeline import TrainingPipeline
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import HARMLESS, RED_TEAM, SMOLLM2
from stagekit.stage import TrainingStage


def pipeline(
    model: Any = SMOLLM2,
    prompts: Any = RED_TEAM,
    harmless: Any = HARMLESS,
    max_prompts: int | None = 64,
    output_dir: str | Path = "runs/cai",
) -> TrainingPipeline:
    """The Constitutional AI pipeline.

    Args:
        model: Where to start: a path, a hub id, a GGUF file, or a live model. It needs a chat template.
        prompts: Red-team prompts, rows with `prompt`: a path, a hub dataset as `Data(...)`, or a live dataset.
        harmless: As many harmless prompts, answered once and learnt unrevised.
        max_prompts: Prompts in all, half of each kind. None = as many as there are.
        output_dir: The run folder.
    """
    shared: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 4,
        "use_mixed_precision": True,
        "mixed_precision_dtype": "bf16",
    }
    sl = TrainingStage(
        name="sl-cai",
        description="answer, critique, revise; learn the revisions",
        method=Constitutional(rounds=2, unrevised=("harmless",), max_critique_tokens=96),
        training_data={"red-team": prompts, "harmless": harmless},
        data_mixing_ratios={"red-team": 0.5, "harmless": 0.5},
        generation=Generation(max_new_tokens=256, temperature=0.7),
        lora=LoRA(rank=16, alpha=32, dropout=0.05),
        logging_steps=2,
        trl={"max_length": 512},
        **({"max_training_samples": max_prompts} if max_prompts is not None else {}),
        **shared,
    )
    rl = TrainingStage(
        name="rl-cai",
        description="prefer the last revision to the first answer",
        method=DPO(beta=0.1),
        training_data="stage:sl-cai/preferences",
        lora=LoRA(rank=16, alpha=32, dropout=0.05, merge=True),
        logging_steps=2,
        trl={"max_length": 512},
        **shared,
    )
    return TrainingPipeline(name="cai", model=model, output_dir=Path(output_dir), stages=(sl, rl))


if __name__ == "__main__":
    sys.exit(launch(pipeline, "cai", "Constitutional AI on a small model; shows the mechanics, claims no quality."))
