"""One process of a PPO run with completions that are given, not sampled: `python -m torch.distributed.run` starts it.

`ppo_worker.py MODEL FOLDER CRITIC LORA` writes rank N's weights, log and advantages to FOLDER/rank-N.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from stagekit.trainers.ppo import PPOConfig, PPOTrainer
from tests.trainers.rl import arguments, letters, prompts


ROLLOUT = 8


class Given(PPOTrainer):
    """The completion of a prompt depends on the prompt alone, so that processes can share them out in any way."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions = []
        for ids in prompt_ids:
            draw = torch.Generator().manual_seed(sum(ids))
            length = 2 + sum(ids) % 4
            completions.append(torch.randint(20, 900, (length,), generator=draw).tolist())
        return completions, None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        sums = (found["advantages"] * found["completion_mask"]).sum(1)
        self.seen = {row["prompt"]: float(value) for row, value in zip(inputs, sums, strict=True)}
        return found


def main(model: str, folder: str, critic: str, lora: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    size = ROLLOUT // int(os.environ.get("WORLD_SIZE", "1"))
    given = {"per_device_train_batch_size": size, "generation_batch_size": ROLLOUT, "shuffle_dataset": False}
    args = PPOConfig(
        **arguments(Path(folder), **given, critic=critic, num_iterations=3, max_steps=6, entropy_coef=0.0, seed=3)
    )
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora == "lora" else None
    trainer = Given(
        model, letters, args, prompts(32), processing_class=AutoTokenizer.from_pretrained(model), peft_config=adapter
    )
    trainer.train()
    rank = trainer.accelerator.process_index
    policy = trainer.accelerator.unwrap_model(trainer.model)
    weights = {f"policy.{name}": weight for name, weight in policy.named_parameters() if weight.requires_grad}
    weights |= {f"critic.{name}": weight for name, weight in trainer.critic.named_parameters()}
    save_file({name: weight.detach().clone() for name, weight in weights.items()}, f"{folder}/rank-{rank}.safetensors")
    found = {"log": trainer.state.log_history, "advantages": trainer.seen}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
