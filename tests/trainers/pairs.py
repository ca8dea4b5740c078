"""Help for tests of preference trainers: their config, and log-probs and losses worked out without TRL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig


def config(folder: Path, **options: Any) -> DPOConfig:
    """A config of one deterministic step after another on the CPU, in float32."""
    given = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 1.0,
        **options,
    }
    return DPOConfig(**given)


def batch_of(trainer: Any, rows: int = 4) -> dict[str, Any]:
    """The first rows as a batch."""
    batch: dict[str, Any] = trainer._prepare_inputs(
        trainer.data_collator([trainer.train_dataset[n] for n in range(rows)])
    )
    return batch


def loss_of(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss that the trainer would step on, with its graph."""
    trainer.model.eval()
    loss: torch.Tensor = trainer.compute_loss(trainer.model, batch)
    return loss


def metrics_of(trainer: Any) -> dict[str, float]:
    """What the last call of the loss logged."""
    return {name: values[-1] for name, values in trainer._metrics["eval"].items()}


class ByHand:
    """Log-probs of a batch from the logits of a model, with plain PyTorch."""

    def __init__(self, model: Any, batch: dict[str, Any]) -> None:
        forward: Callable[..., Any] = type(model).forward  # not TRL's fused one
        logits = forward(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["input_ids"][:, 1:]
        self.tokens = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        mask = batch["completion_mask"][:, 1:]
        self.chosen, self.rejected = (self.tokens * mask).sum(1).chunk(2)
        self.chosen_length, self.rejected_length = mask.sum(1).chunk(2)
        attention = batch["attention_mask"][:, 1:]
        chosen_tokens, chosen_attention = self.tokens.chunk(2)[0], attention.chunk(2)[0]
        self.sequence_nll = -(chosen_tokens * chosen_attention).sum() / chosen_attention.sum()
        self.completion_nll = -(chosen_tokens * mask.chunk(2)[0]).sum() / mask.chunk(2)[0].sum()

    @property
    def chosen_average(self) -> torch.Tensor:
        return self.chosen / self.chosen_length

    @property
    def rejected_average(self) -> torch.Tensor:
        return self.rejected / self.rejected_length


def plain(rows: list[dict[str, Any]]) -> Dataset:
    """The rows as texts."""
    return Dataset.from_list([{name: turns[0]["content"] for name, turns in row.items()} for row in rows])


def even_rows(tokenizer: Any) -> Dataset:
    """16 pairs of digits, of which every part has as many tokens as in every other pair."""
    rows = []
    for n in range(100):
        row = {"prompt": f"{7 * n:03d}=", "chosen": f"{4637 * n % 9999:04d}", "rejected": f"{8093 * n % 9999:04d}"}
        if [len(tokenizer(row["prompt"] + row[side])["input_ids"]) for side in ("chosen", "rejected")] == [8, 8]:
            rows.append(row)
    return Dataset.from_list(rows[:16])


def another(model: Any, seed: int = 0) -> Any:
    """The model with noise on its weights, so that a reference differs from the policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def make(kind: Any, model: Any, rows: Any, folder: Path, path: str, given: dict[str, Any], **options: Any) -> Any:
    """A trainer; `given` goes into its config."""
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    tokenizer = AutoTokenizer.from_pretrained(path)
    return kind(model=model, args=config(folder, **given), train_dataset=data, processing_class=tokenizer, **options)
