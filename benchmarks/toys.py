"""Small random models and tokenizers of one token per word, for benchmarks that need no language.

Imports nothing of stagekit or TRL, so that a child process with another TRL can use it.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer(words: int) -> Any:
    """One token per word `w0`, `w1`, ...; the last two are the end and the padding."""
    vocabulary = {f"w{number}": number for number in range(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=f"w{words - 2}", pad_token=f"w{words - 1}", unk_token="w0"
    )


def llama(words: int, width: int, blocks: int, seed: int) -> Any:
    """A random model without tied embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=words - 1,
            eos_token_id=words - 2, bos_token_id=None,
        )
    )  # fmt: skip
