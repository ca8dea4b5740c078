"""Tiny models to freeze, trainers of them, and what they moved."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from trl import DPOConfig, SFTConfig, SFTTrainer


def llama(tied: bool = True, layers: int = 12) -> LlamaForCausalLM:
    """A tiny Llama with 12 blocks; each has 9 weights."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=960,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    """A tiny GPT-2: its blocks are `transformer.h`, with biases, and its head is tied."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=960,
        n_positions=128,
        n_embd=16,
        n_layer=3,
        n_head=2,
        bos_token_id=2,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}


def trainer_of(
    model: Any, rows: list[dict[str, Any]], folder: Path, tiny: str, cls: Any = SFTTrainer, **options: Any
) -> Any:
    """A trainer of 8 steps, two an epoch."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    peft_config = options.pop("peft_config", None)
    return cls(
        model=model,
        args=(SFTConfig if issubclass(cls, SFTTrainer) else DPOConfig)(**{**common, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=peft_config,
    )


def holding(cls: Any, before_optimizer: Any) -> Any:
    """What the mixin does: a call right before the optimiser is made."""

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        before_optimizer()
        return cls.create_optimizer(self, *args, **kwargs)

    return type(f"Holding{cls.__name__}", (cls,), {"create_optimizer": create_optimizer})


def lora(model: Any, **extras: Any) -> Any:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **extras}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options))


def blocks_with_adapters(model: Any, only_trained: bool = True) -> set[int]:
    return {
        int(name.split(".layers.")[1].split(".")[0])
        for name, one in model.named_parameters()
        if "lora_" in name and (one.requires_grad or not only_trained)
    }
