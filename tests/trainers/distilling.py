"""What the tests of the distillation trainer share: small trainers, teachers of other sizes, losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stagekit.trainers.distillation import DistillationConfig, DistillationTrainer


SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
}


def config(folder: Path, **changes: Any) -> DistillationConfig:
    return DistillationConfig(str(folder / "out"), **{**SETTINGS, **changes})


def tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


def model(path: str, seed: int | None = None, **changes: Any) -> Any:
    """The tiny model, or a random one of other sizes with its tokenizer."""
    if seed is None:
        return AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig.from_pretrained(path, **changes))
    made.config._name_or_path = made.name_or_path = path
    return made


def builder(path: str, rows: Dataset, folder: Path) -> Callable[..., DistillationTrainer]:
    """`build(teacher, student=None, data=None, **config)`: a trainer of the tiny student on some rows."""

    def make(teacher: Any, student: Any = None, data: Any = None, peft: Any = None, **changes: Any) -> Any:
        return DistillationTrainer(
            student if student is not None else path,
            config(folder, **changes),
            teacher_model=teacher,
            train_dataset=data if data is not None else rows,
            eval_dataset=rows,
            processing_class=tokenizer(path),
            peft_config=peft,
        )

    return make


def batch(trainer: Any, count: int = 4) -> dict[str, Any]:
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(count)]))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def loss_of(trainer: Any, given: dict[str, Any], items: int) -> float:
    return float(trainer.compute_loss(trainer.model, dict(given), num_items_in_batch=torch.tensor(items)).detach())
