"""The decode loop against transformers' own `generate`: the same tokens, in fewer and smaller forward passes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stagekit.decoding import SPARE_TOKENS, can_decode, decode
from stagekit.requests import Sampling


GREEDY = Sampling(temperature=0)
PAD = 3
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [5, 6, 7, 8, 9], [12], [20, 30, 40, 50, 60, 70, 80]]


def ours(model: Any, prompts: Sequence[Sequence[int]], limit: int, sampling: Sampling, eos: set[int]) -> list[Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        return decode(model.eval(), prompts, [limit] * len(prompts), sampling=sampling, eos=eos, pad=PAD)


def theirs(model: Any, prompts: Sequence[Sequence[int]], limit: int, sampling: Sampling, eos: set[int]) -> list[Any]:
    """By `generate`, each row up to its first EOS."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    config = GenerationConfig(**how, max_new_tokens=limit, pad_token_id=PAD, eos_token_id=sorted(eos) or None)
    model.generation_config = GenerationConfig()  # from which transformers would fill an EOS in
    torch.manual_seed(0)
    rows = model.eval().generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in eos), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def spread(model: Any) -> Any:
    """Make the random model's next token clear-cut, so that a comparison does not hang on rounding."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


SMALL: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(0.7), Sampling(1.2, 0.9, 20)], ids=str)
@pytest.mark.parametrize("kind", [*sorted(MODELS), "tiny"])
def test_the_tokens_are_those_of_generate(kind: str, sampling: Sampling, tiny_model_path: str) -> None:
    torch.manual_seed(0)
    model = spread(AutoModelForCausalLM.from_pretrained(tiny_model_path) if kind == "tiny" else MODELS[kind]())
    first = theirs(model, PROMPTS, 40, sampling, set())
    eos = {first[0][5], first[3][9], first[4][20]}  # so that rows end at different times
    expected = theirs(model, PROMPTS, 40, sampling, eos)
    assert len({len(row) for row in expected}) > 1
    assert ours(model, PROMPTS, 40, sampling, eos) == expected


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5)], ids=str
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling) -> None:
    torch.manual_seed(0)
    model = MODELS["gpt2"]().eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(6)  # some tokens are likely, most are not
        logits = model(torch.tensor([[5, 6, 7]])).logits[:, -1]
    warpers = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chances = LogitsProcessorList(warpers)(None, logits).softmax(-1)[0]
    draws = 8000
    tokens = torch.tensor(ours(model, [[5, 6, 7]] * draws, 1, sampling, set())).flatten()
    counts = torch.bincount(tokens, minlength=len(chances)).float()
    assert counts[chances == 0].sum() == 0
    expected = draws * chances
    likely = expected > 10
    assert likely.sum() >= 2
    deviations = (counts - expected)[likely] / (expected * (1 - chances))[likely].clamp(min=1e-6).sqrt()
    assert deviations.abs().max() < 4.5


def test_a_cache_that_outgrows_its_room_is_the_same_cache(tiny_model: Any) -> None:
    model = spread(tiny_model)
    limit = 2 * SPARE_TOKENS + 10
    assert ours(model, PROMPTS[:2], limit, GREEDY, set()) == theirs(model, PROMPTS[:2], limit, GREEDY, set())


def shapes(model: Any) -> list[tuple[int, int]]:
    """Rows and tokens of every forward pass from now on."""
    seen: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


def test_samples_of_one_prompt_share_one_prefill(tiny_model: Any) -> None:
    seen = shapes(tiny_model)
    rows = ours(tiny_model, [[5, 6, 7]] * 6 + [[8, 9]] * 2, 5, Sampling(1.0), set())
    assert seen == [(2, 3)] + [(8, 1)] * 4
    assert len({tuple(row) for row in rows[:6]}) > 1


def test_a_finished_row_leaves_the_batch(tiny_model: Any) -> None:
    model = spread(tiny_model)
    plain = ours(model, PROMPTS[:2] + PROMPTS[3:], 20, GREEDY, set())
    eos = {plain[0][3]}
    expected = ours(model, PROMPTS[:2] + PROMPTS[3:], 20, GREEDY, eos)
    seen = shapes(model)
    assert ours(model, PROMPTS[:2] + PROMPTS[3:], 20, GREEDY, eos) == expected
    row_steps = sum(rows for rows, _ in seen[1:])
    assert row_steps == sum(len(row) - 1 for row in expected)
    assert row_steps < 4 * (len(seen) - 1)


def test_each_row_has_its_own_limit(tiny_model: Any) -> None:
    with torch.no_grad():
        rows = decode(tiny_model.eval(), [[5], [5], [6, 7]], [1, 4, 2], sampling=GREEDY, eos=set(), pad=PAD)
    assert [len(row) for row in rows] == [1, 4, 2]
    assert rows[1][:1] == rows[0]


def test_a_rows_draws_do_not_depend_on_when_others_leave(tiny_model: Any) -> None:
    model = spread(tiny_model)
    prompts = [[5, 6], [7, 8], [9, 10]]
    plain = ours(model, prompts, 12, Sampling(1.0), set())
    place = next(place for place, token in enumerate(plain[0]) if token not in (*plain[1], *plain[2]))
    ended = ours(model, prompts, 12, Sampling(1.0), {plain[0][place]})
    assert ended == [plain[0][: place + 1], *plain[1:]]
    assert place < 11


def test_the_heartbeat_tells_rows_and_tokens(tiny_model: Any) -> None:
    beats: list[tuple[int, int, int]] = []
    with torch.no_grad():
        decode(
            tiny_model.eval(), [[5], [6]], [3, 2], sampling=GREEDY, eos=set(), pad=PAD,
            on_token=lambda *beat: beats.append(beat),
        )  # fmt: skip
    assert beats == [(2, 1, 3), (2, 2, 3), (2, 3, 3)]


def test_models_with_a_state_of_another_kind_are_left_to_transformers(tiny_model: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=200, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert can_decode(tiny_model)
    assert not can_decode(mamba)
