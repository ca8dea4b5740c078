"""What TRL 1.12's PRM trainer gives on a fixed batch: the numbers of `test_process_reward.py`.

The model and the tokenizer are built from formulas, so nothing else can change the numbers. To print them again:

    pip download --no-deps trl==1.12.0 -d /tmp/wheel && unzip -q /tmp/wheel/trl-1.12.0-*.whl -d /tmp/trl112
    TRL_EXPERIMENTAL_SILENCE=1 PYTHONPATH=/tmp/trl112:. python -m tests.trainers.prm_oracle
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForTokenClassification, PreTrainedTokenizerFast


ROWS: list[dict[str, Any]] = [
    {"prompt": "2+3*2? ", "completions": ["3*2=6", "2+6=8"], "labels": [True, True]},
    {"prompt": "9-4? ", "completions": ["It is", "9-4=6", "6"], "labels": [True, False, False]},
    {"prompt": "1+1? ", "completions": ["3"], "labels": [False]},
    {"prompt": "Long: ", "completions": ["a" * 20, "b" * 20, "c" * 20], "labels": [True, False, True]},
]
TRAINING: dict[str, Any] = {
    "max_length": 60,
    "step_separator": "\n\n",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with BOS, EOS and padding."""
    vocabulary = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def model() -> LlamaForTokenClassification:
    """A Llama of one layer whose weights are a sine of their position."""
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, num_labels=2, pad_token_id=2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    built = LlamaForTokenClassification(config).float()
    with torch.no_grad():
        for number, (name, weight) in enumerate(built.named_parameters()):
            if "norm" not in name:
                wave = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) * (1.7 + 0.1 * number))
                weight.copy_((0.3 * wave).float().view_as(weight))
    return built


def main() -> None:
    """Train three steps with TRL 1.12 and print what the test compares."""
    from trl import __version__
    from trl.experimental.prm import PRMConfig, PRMTrainer

    assert __version__.startswith("1.12."), __version__
    with tempfile.TemporaryDirectory() as folder:
        trainer = PRMTrainer(
            model(), PRMConfig(str(Path(folder)), **TRAINING), train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS), processing_class=tokenizer(),
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "labels": [
            {place: label for place, label in enumerate(row["labels"]) if label != -100}
            | {"tokens": len(row["labels"])}
            for row in trainer.train_dataset
        ],
        "last_row": trainer.train_dataset[2]["input_ids"],
        "losses": [entry["loss"] for entry in log],
        "grad_norms": [entry["grad_norm"] for entry in log],
        "before": [before["eval_loss"], before["eval_accuracy"]],
        "after": [after["eval_loss"], after["eval_accuracy"]],
        "head": trainer.model.score.weight.sum(1).tolist(),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
