"""Reinforcement learning from AI feedback: demonstrations, a judge's labels in the place of people's, preferences.

Stage `sft` learns from demonstrations; in `feedback` its model answers every prompt twice, and a judge says by a
principle which answer is better, with a probability; `prefer` learns that by DPO with soft labels. How often the judge
is right is measured on pairs whose better answer is known (`held_out/judge/accuracy`): look there first. For RL-CAI,
with a reward model and PPO on the same labels, see recipes/rlaif/rl-cai.yaml.
Source: huggingface.co/papers/2212.08073, section 4, and huggingface.co/papers/2309.00267, with DPO in the place of RL.

    python -m stagekit.recipes.rlaif
"""

import sys
from pathlib import Path
from typing import Any

from stagekit.adapters.ai_feedback import AIFeedback
from stagekit.adapters.dpo import DPO
from stagekit.groups import Generation, LoRA
from stagekit.pipeline import TrainingPipeline
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import LISTS_PAIRS, LISTS_PROMPTS, LISTS_SHOWN, SMOLLM2
from stagekit.stage import TrainingStage


PRINCIPLES = (
    "Which of the two responses is a list of exactly three lines that begin with a dash?",
    "Which of the two responses has the form of a list with dashes, and nothing else beside it?",
)


def pipeline(
    model: Any = SMOLLM2,
    judge: Any = SMOLLM2,
    demonstrations: Any = LISTS_SHOWN,
    prompts: Any = LISTS_PROMPTS,
    pairs: Any = LISTS_PAIRS,
    principles: tuple[str, ...] | None = PRINCIPLES,
    output_dir: str | Path = "runs/rlaif",
) -> TrainingPipeline:
    """SFT, AI feedback, DPO.

    Args:
        model: Where to start: a path, a hub id, a GGUF file, or a live model. It needs a chat template.
        judge: Who compares: a model by its name, a server, a function; None: the model after `sft`.
        demonstrations: Rows with `prompt` and `completion`.
        prompts: Rows with `prompt`.
        pairs: Rows with `prompt`, `chosen` and `rejected`, to measure the judge on.
        principles: What the judge decides by. None = stagekit's own, for helpful, harmless and honest answers.
        output_dir: The run folder.
    """
    precision: dict[str, Any] = {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}
    adapter, cut = LoRA(rank=16, alpha=32), {"max_length": 256}
    sft = TrainingStage(
        name="sft",
        description="learn from demonstrations",
        training_data=demonstrations,
        epochs=1,
        batch_size=4,
        lora=adapter,
        logging_steps=4,
        trl=cut,
        **precision,
    )
    feedback = TrainingStage(
        name="feedback",
        description="answer twice, let the judge say which is better",
        method=AIFeedback(
            judge=judge, tie_margin=0.005, **({"principles": principles} if principles is not None else {})
        ),
        training_data=prompts,
        validation_data=pairs,
        max_training_samples=48,
        generation=Generation(max_new_tokens=96),
        **precision,
    )
    prefer = TrainingStage(
        name="prefer",
        description="prefer what the judge prefers, as far as it is sure",
        method=DPO(beta=0.1, soft_labels=True),
        training_data="stage:feedback/preferences",
        epochs=1,
        batch_size=8,
        lora=LoRA(rank=16, alpha=32, merge=True),
        logging_steps=2,
        trl=cut,
        **precision,
    )
    return TrainingPipeline(name="rlaif", model=model, output_dir=Path(output_dir), stages=(sft, feedback, prefer))


if __name__ == "__main__":
    sys.exit(launch(pipeline, "rlaif", "SFT, AI feedback and DPO on a small model; shows the mechanics."))
