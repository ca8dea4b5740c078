"""Help for tests of trainers that sample: prompts, a reward that can be learned, a small config, a trainer."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagekit.trainers.ppo import PPOConfig, PPOTrainer


def prompts(count: int) -> Dataset:
    """Prompts of several lengths, so that batches are padded."""
    return Dataset.from_dict({"prompt": [f"{'Well, ' * (row % 4)}say {row}:" for row in range(count)]})


def letters(prompts: Any, completions: list[Any], **columns: Any) -> list[float]:
    """How many of the letter e a completion has."""
    return [completion.count("e") / 4 for completion in completions]


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """Deterministic steps on the CPU, in float32, logged one by one."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "generation_batch_size": 8,
        "max_steps": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


def ppo(folder: Path, model: Any, *, rows: int = 32, reward: Any = letters, **options: Any) -> PPOTrainer:
    """A PPO trainer; options of the trainer itself are `critic_model`, `peft_config`, `train_dataset` and so on."""
    own = {
        key: options.pop(key)
        for key in ("critic_model", "peft_config", "processing_class", "train_dataset", "eval_dataset", "callbacks")
        if key in options
    }
    own.setdefault("train_dataset", prompts(rows))
    if isinstance(model, str):
        own.setdefault("processing_class", AutoTokenizer.from_pretrained(model))
    return PPOTrainer(model, reward, PPOConfig(**arguments(folder, **options)), **own)


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def perturbed(model: Any, seed: int = 0) -> Any:
    """The model with other weights than those on disk."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return model


def rollout(trainer: Any) -> dict[str, Any]:
    """The first rollout, as it would be trained on."""
    trainer.model.train()
    count = trainer.args.generation_batch_size // trainer.num_generations
    rows = [trainer.train_dataset[row] for row in range(count) for _ in range(trainer.num_generations)]
    found: dict[str, Any] = trainer._generate_and_score_completions(rows)
    return found


def log_of(trainer: Any, key: str) -> list[float]:
    """The values of one number over all log lines."""
    return [line[key] for line in trainer.state.log_history if key in line]


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
