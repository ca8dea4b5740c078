"""The committed tiny model is what its build script writes, and it does what the tests and the demo need."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import (
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from tests.build_tiny_model import EOS_TOKEN, TINY, VOCAB_SIZE, build


USER = [{"role": "user", "content": "Name a fruit."}]
TEXTS = ("Name a fruit.", "\n\n  two  spaces\n", "naïve 日本 🙂 \x00\t", "<|im_start|>user\nhi<|im_end|>\n", "")


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build(folder)
    return folder


def test_rebuilding_gives_the_committed_weights(rebuilt: Path) -> None:
    committed, again = load_file(TINY / "model.safetensors"), load_file(rebuilt / "model.safetensors")
    assert committed.keys() == again.keys()
    for name, weight in committed.items():
        assert weight.dtype == torch.float32
        # Equal bits on one machine; torch's normal_ rounds differently with and without AVX2.
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6, msg=name)


def test_rebuilding_gives_the_committed_tokenizer(rebuilt: Path) -> None:
    committed, again = AutoTokenizer.from_pretrained(TINY), AutoTokenizer.from_pretrained(rebuilt)
    assert committed.get_vocab() == again.get_vocab()
    assert committed.chat_template == again.chat_template
    assert [committed(text)["input_ids"] for text in TEXTS] == [again(text)["input_ids"] for text in TEXTS]


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert set(files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 600_000


def test_special_tokens_agree_in_model_and_tokenizer(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(tiny_tokenizer) == tiny_model.config.vocab_size == VOCAB_SIZE
    assert (tiny_tokenizer.bos_token, tiny_tokenizer.eos_token, tiny_tokenizer.pad_token) == (
        None,
        "<|im_end|>",
        "<|pad|>",
    )
    for config in (tiny_model.config, tiny_model.generation_config):
        assert config.bos_token_id is None
        assert config.eos_token_id == tiny_tokenizer.eos_token_id
        assert config.pad_token_id == tiny_tokenizer.pad_token_id
    assert tiny_model.lm_head.weight is tiny_model.model.embed_tokens.weight


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_encoding_and_decoding(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text


def test_the_assistant_mask_covers_the_answers_and_their_end_of_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        *USER,
        {"role": "assistant", "content": "An apple."},
        *USER,
        {"role": "assistant", "content": "\nPear"},
    ]
    encoded = tiny_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tiny_tokenizer.decode(kept) == f"An apple.{EOS_TOKEN}\nPear{EOS_TOKEN}"


@pytest.mark.parametrize("answer", ["An apple.", "\nAn apple.", "\n\n\nAn apple.", " An apple.", "user", ""])
def test_the_tokens_of_the_prompt_are_a_prefix_of_prompt_and_completion(
    tiny_tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    prompt = tiny_tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    turn = [*USER, {"role": "assistant", "content": answer}]
    whole = tiny_tokenizer.apply_chat_template(turn, return_dict=False)
    longer = tiny_tokenizer.apply_chat_template([*turn, *USER], return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert longer[: len(whole)] == whole


def test_trl_finds_nothing_to_patch_in_the_chat_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert supports_tool_calling(tiny_tokenizer)
    assert is_chat_template_prefix_preserving(tiny_tokenizer)
    assert is_chat_template_stop_token_trained(tiny_tokenizer)


def test_sampling_is_varied_and_sometimes_ends_by_itself(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    inputs = tiny_tokenizer.apply_chat_template(
        [USER] * 64, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = tiny_model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=64)
    new = output[:, inputs["input_ids"].shape[1] :]
    lengths = (new != tiny_tokenizer.pad_token_id).sum(1).float()
    ended = (new == tiny_tokenizer.eos_token_id).any(1).float().mean()
    # 512 draws gave 0.92 ended and 25 tokens; bounds for 64 draws on any version of torch.
    assert ended > 0.7
    assert 12 < lengths.mean() < 45
    texts = {tiny_tokenizer.decode(row, skip_special_tokens=True) for row in new}
    assert len(texts) > 56
    # Control and broken characters are rare, so that text rewards and judges see text.
    assert sum("\ufffd" in text for text in texts) < 24
