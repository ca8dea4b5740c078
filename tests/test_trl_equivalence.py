"""A stage trains as the bare TRL call does, written out here by hand: the same loss at every one of 20 steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from stagekit.adapters import DPO, SFT
from stagekit.groups import LoRA
from tests.running import lines, run, stage, weights


COMMON: dict[str, Any] = {
    "max_steps": 20,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "seed": 42,
    "bf16": False,
    "fp16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def bare(trainer: Any) -> list[float]:
    """The losses of a trainer that is run as TRL's documentation does it."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def staged(model: str, folder: Path, rows: Path, method: Any, **options: Any) -> tuple[list[float], str]:
    given: dict[str, Any] = {"max_steps": 20, "checkpoint_save_steps": 7, "use_deterministic_algorithms": ...}
    result = run(model, folder, stage("s", str(rows), method, **{**given, **options}))
    return [line["loss"] for line in lines(folder / "01-s") if "loss" in line], str(result.policy)


def agree(model: Any, policy: str) -> bool:
    saved = weights(policy)
    if isinstance(model, PeftModel):
        trained = {name.replace(".default.", "."): tensor for name, tensor in model.named_parameters()}
        return all(torch.equal(trained[name], saved[name]) for name in saved)
    trained = dict(model.named_parameters())
    return all(torch.equal(trained[name], saved[name]) for name in saved)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_of_all_weights(
    accumulate: int, tiny_model_path: str, sft_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    losses, policy = staged(
        tiny_model_path, tmp_path / "run", write_rows(sft_rows), SFT(), gradient_accumulation_steps=accumulate
    )
    config = SFTConfig(output_dir=str(tmp_path / "trl"), **{**COMMON, "gradient_accumulation_steps": accumulate})
    trainer = SFTTrainer(
        model=tiny_model_path,
        args=config,
        train_dataset=Dataset.from_list(sft_rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    assert losses == bare(trainer)
    assert len(losses) == 20
    assert agree(trainer.model, policy)


def test_sft_with_lora(
    tiny_model_path: str, sft_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    lora = LoRA(rank=4, alpha=8, dropout=0.1)
    losses, policy = staged(tiny_model_path, tmp_path / "run", write_rows(sft_rows), SFT(), lora=lora)
    config = SFTConfig(output_dir=str(tmp_path / "trl"), **COMMON)
    trainer = SFTTrainer(
        model=tiny_model_path,
        args=config,
        train_dataset=Dataset.from_list(sft_rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    assert losses == bare(trainer)
    assert agree(trainer.model, policy)


@pytest.mark.parametrize(("loss", "accumulate"), [("sigmoid", 1), ("hinge", 1), ("ipo", 1), ("sigmoid", 2)], ids=str)
def test_dpo_of_all_weights(
    loss: Any,
    accumulate: int,
    tiny_model_path: str,
    preference_rows: list[Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    losses, policy = staged(
        tiny_model_path,
        tmp_path / "run",
        write_rows(preference_rows),
        DPO(loss=loss, beta=0.2),
        gradient_accumulation_steps=accumulate,
    )
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        **{**COMMON, "gradient_accumulation_steps": accumulate},
        loss_type=[loss],
        beta=0.2,
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(
        model=tiny_model_path,
        args=config,
        train_dataset=Dataset.from_list(preference_rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    assert losses == bare(trainer)
    assert len(losses) == 20
    assert agree(trainer.model, policy)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_dpo_with_lora(
    loss: Any, tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    lora = LoRA(rank=4, alpha=8, dropout=0)
    losses, policy = staged(
        tiny_model_path, tmp_path / "run", write_rows(preference_rows), DPO(loss=loss, beta=0.2), lora=lora
    )
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), **COMMON, loss_type=[loss], beta=0.2, precompute_ref_log_probs=False
    )
    trainer = DPOTrainer(
        model=tiny_model_path,
        args=config,
        train_dataset=Dataset.from_list(preference_rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    assert losses == bare(trainer)
    assert agree(trainer.model, policy)


def test_dpo_on_an_incoming_adapter(
    tiny_model_path: str,
    sft_rows: list[Any],
    preference_rows: list[Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    lora = LoRA(rank=4, alpha=8, dropout=0)
    first = stage("sft", str(write_rows(sft_rows, "a.jsonl")), lora=lora, max_steps=4, learning_rate=1e-2)
    options = {"max_steps": 20, "use_deterministic_algorithms": ...}
    second = stage("dpo", str(write_rows(preference_rows, "b.jsonl")), DPO(beta=0.2), lora=lora, **options)
    result = run(tiny_model_path, tmp_path / "run", first, second)
    losses = [line["loss"] for line in lines(tmp_path / "run/02-dpo") if "loss" in line]

    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, str(result["sft"].policy), is_trainable=True),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), **COMMON, loss_type=["sigmoid"], beta=0.2),
        train_dataset=Dataset.from_list(preference_rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    assert losses == bare(trainer)
    assert agree(trainer.model, str(result.policy))


def test_sft_in_bfloat16_with_checkpointing_of_activations(
    tiny_model_path: str, sft_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    losses, _ = staged(
        tiny_model_path,
        tmp_path / "run",
        write_rows(sft_rows),
        SFT(),
        use_mixed_precision=True,
        mixed_precision_dtype="bf16",
        use_gradient_checkpointing=True,
        shuffle_data=False,
    )
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        **{**COMMON, "bf16": True, "gradient_checkpointing": True, "train_sampling_strategy": "sequential"},
    )
    trainer = SFTTrainer(
        model=tiny_model_path,
        args=config,
        train_dataset=Dataset.from_list(sft_rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    assert losses == bare(trainer)
