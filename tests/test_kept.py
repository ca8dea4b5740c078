"""What is kept between the turns of conversations: the same tokens as without, and nothing read twice."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from stagekit.decoding import _Reader, decode
from stagekit.generation import TransformersGenerator
from stagekit.kept import PASS, Kept, Known, _passes, can_keep, prefill
from stagekit.requests import Message, Request, Sampling, ScriptedGenerator, remembering
from tests.test_decoding import GREEDY, PAD, SMALL, ours, shapes, spread, theirs


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
}
WINDOWS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], pad_token_id=0
        )
    ),
}


def model_of(kind: str, tiny_model_path: str) -> Any:
    torch.manual_seed(0)
    return spread(AutoModelForCausalLM.from_pretrained(tiny_model_path) if kind == "tiny" else MODELS[kind]()).eval()


EOS = set(range(7, 5000, 9))
"""So many that rows end at different times."""


def turn(model: Any, prompts: Sequence[Sequence[int]], names: Sequence[str], kept: Kept | None) -> list[list[int]]:
    with torch.no_grad():
        return decode(model, prompts, [16] * len(names), sampling=GREEDY, eos=EOS, pad=PAD, kept=kept, names=names)


@pytest.mark.parametrize("kind", [*sorted(MODELS), "tiny"])
def test_the_tokens_of_every_turn_are_those_without_keeping(kind: str, tiny_model_path: str) -> None:
    """Conversations that grow, are left out of a turn, are cut back, and are asked again as they are."""
    model, chance = model_of(kind, tiny_model_path), random.Random(3)
    lengths = {"a": 3, "b": 30, "c": 9, "d": 1, "e": 14}
    talks = {name: [chance.randrange(24, 200) for _ in range(length)] for name, length in lengths.items()}
    kept, ends = Kept(), set()
    for number in range(6):
        names = [name for name in talks if chance.random() < 0.8] or ["a"]
        prompts = [talks[name] for name in names]
        with_it, without = turn(model, prompts, names, kept), turn(model, prompts, names, None)
        assert with_it == without
        for name, row in zip(names, with_it, strict=True):
            ends.add(len(row))
            if number == 2:
                talks[name] = talks[name][: len(talks[name]) // 2 + 1]  # what followed is of no use
            elif number != 3:  # where it is, the same prompt comes again
                talks[name] = [*talks[name], *row, *chance.choices(range(24, 200), k=chance.randrange(1, 9))]
    assert len(ends) > 2


def test_the_logits_are_those_of_a_whole_prefill_whatever_is_known(tiny_model: Any) -> None:
    model, chance = spread(tiny_model).eval(), random.Random(0)
    reader, device = _Reader(model), torch.device("cpu")

    def read(prompts: Any, known: Any) -> Any:
        with torch.no_grad():
            return prefill(reader.go_on, reader.new_cache, prompts, known, PAD, device)

    for _ in range(12):
        prompts = [
            [chance.randrange(200) for _ in range(chance.randrange(1, 260))] for _ in range(chance.randrange(1, 6))
        ]
        known = []
        for prompt in prompts:
            before = [*prompt[: chance.randrange(len(prompt) + 1)], *([5] * chance.randrange(3))]
            kept = Kept()
            if before:
                kept.keep("it", before, read([before], [Known(())])[0], 0, 0)
            known.append(kept.take("it"))
        cache, mask, logits = read(prompts, known)
        assert mask.sum(-1).tolist() == [len(prompt) for prompt in prompts]
        for row, prompt in enumerate(prompts):
            whole, _, expected = read([prompt], [Known(())])
            assert torch.allclose(logits[row], expected[0], atol=2e-3)
            for layer, own in zip(cache.layers, whole.layers, strict=True):
                assert torch.allclose(layer.keys[row, :, -len(prompt) :], own.keys[0], atol=2e-3)
                assert torch.allclose(layer.values[row, :, -len(prompt) :], own.values[0], atol=2e-3)


def test_only_what_is_new_is_read(tiny_model: Any) -> None:
    model = spread(tiny_model).eval()
    kept, talks = Kept(), {"a": [30, 31, 32, 33, 34, 35], "b": [40, 41, 42]}
    first = turn(model, list(talks.values()), list(talks), kept)
    more = {"a": [50, 51, 52], "b": [60]}
    prompts = [[*talks[name], *row, *more[name]] for name, row in zip(talks, first, strict=True)]
    seen = shapes(model)
    turn(model, prompts, list(talks), kept)
    assert seen[0] == (2, 1 + 3)  # the last token written was drawn and not read
    seen.clear()
    turn(model, [prompts[1]], ["b"], kept)  # once more, as where a text was empty
    assert seen[0] == (1, 1)
    seen.clear()
    turn(model, [[9, *prompts[0]]], ["a"], kept)
    assert seen[0] == (1, 1 + len(prompts[0]))


def test_what_all_prompts_begin_with_is_read_once(tiny_model: Any) -> None:
    model, kept = spread(tiny_model).eval(), Kept()
    system = [20 + place for place in range(PASS)]
    prompts = [[*system, 5], [*system, 6, 7, 8], [*system, 9, 5]]
    expected = turn(model, prompts, list("abc"), None)
    seen = shapes(model)
    assert turn(model, prompts, list("abc"), kept) == expected
    assert seen[:2] == [(1, PASS), (3, 3)]


def test_prompts_with_little_to_read_are_read_apart_from_those_with_much() -> None:
    rests = [3, 200, 4, 3, 190, 5, 3]
    passes = _passes(sorted(range(len(rests)), key=lambda row: -rests[row]), rests)
    assert passes == [[1, 4], [0, 2, 3, 5, 6]]
    alike = [20, 21, 22, 23]
    assert _passes([3, 2, 1, 0], alike) == [[0, 1, 2, 3]]
    chance = random.Random(0)
    for _ in range(50):
        rests = [chance.randrange(1, 300) for _ in range(chance.randrange(1, 40))]
        order = sorted(range(len(rests)), key=lambda row: -rests[row])
        passes = _passes(order, rests)
        assert sorted(row for rows in passes for row in rows) == list(range(len(rests)))
        padded = sum(len(rows) * max(rests[row] for row in rows) for rows in passes)
        assert padded + PASS * (len(passes) - 1) <= len(rests) * max(rests)


@pytest.mark.parametrize("kind", sorted(WINDOWS))
def test_a_cache_with_a_window_is_not_kept_and_the_tokens_are_those_of_generate(kind: str) -> None:
    torch.manual_seed(0)
    model = spread(WINDOWS[kind]()).eval()
    assert not can_keep(model)
    prompts = [[30, 31, 32, 33] * 5, [40, 41, 42]]
    expected = theirs(model, prompts, 12, GREEDY, set())
    assert ours(model, prompts, 12, GREEDY, set()) == expected
    generator = _Numbers(model)
    seen = shapes(model)
    with remembering(generator):
        for number in range(2):
            asked = [generator.request(name, prompt) for name, prompt in zip("ab", prompts, strict=True)]
            written = generator.generate(asked, number)
            assert [list(one.token_ids) for one in written] == theirs(model, prompts, 6, GREEDY, set())
            prompts = [[*prompt, *one.token_ids, 50, 51] for prompt, one in zip(prompts, written, strict=True)]
    assert seen[0] == (2, 20) and (2, 28) in seen  # the whole conversation, both times


class _Numbers(TransformersGenerator):
    """A generator whose prompts are numbers, the token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, _NoTokenizer(), GREEDY, "numbers", templated=False)

    def request(self, name: str, ids: Sequence[int]) -> Request:
        return Request(name, ({"role": "user", "content": " ".join(map(str, ids))},), 6, conversation=name)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return [int(one) for one in messages[0]["content"].split()]


class _NoTokenizer:
    eos_token_id = None
    pad_token_id = PAD
    chat_template = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def test_which_models_can_keep(tiny_model: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import MambaConfig, MambaForCausalLM

    assert can_keep(tiny_model)
    assert can_keep(get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"])))
    assert all(can_keep(model()) for model in MODELS.values())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not can_keep(LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope)))
    assert can_keep(LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters={**rope, "rope_type": "linear"})))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=200, hidden_size=16, num_hidden_layers=1, state_size=4))
    generator = _Numbers(mamba)
    with remembering(generator):  # by transformers' own loop, turn by turn
        assert len(generator.generate([generator.request("a", [5, 6, 7])], 0)[0].token_ids) == 6


def say(*turns: str) -> tuple[Message, ...]:
    return tuple({"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns))


@pytest.fixture
def generator(tiny_model: Any, tiny_tokenizer: Any) -> TransformersGenerator:
    return TransformersGenerator(spread(tiny_model), tiny_tokenizer, Sampling(temperature=0), "tiny")


def talk(generator: TransformersGenerator, seed: int = 0) -> list[list[Any]]:
    """Three conversations of three turns, as text."""
    talks: list[tuple[str, ...]] = [("Name a fruit.",), ("Is the earth round? Say why, please.",), ("Hi",)]
    turns = []
    for number in range(3):
        asked = [
            Request(f"{row} {number}", say(*turns_), 12, conversation=str(row)) for row, turns_ in enumerate(talks)
        ]
        written = generator.generate(asked, seed + number)
        turns.append(written)
        talks = [(*before, one.text.strip(), "And why?") for before, one in zip(talks, written, strict=True)]
    return turns


def test_conversations_through_a_template_are_the_same_with_and_without_keeping(
    generator: TransformersGenerator,
) -> None:
    plain = talk(generator)
    seen = shapes(generator.model)
    with remembering(generator, generator):
        kept = talk(generator)
    read = sum(rows * tokens for rows, tokens in seen if tokens > 1)
    assert kept == plain
    assert read < 0.8 * sum(one.prompt_tokens for written in plain for one in written)


def test_a_template_that_changes_what_was_said_is_read_anew_from_there(generator: TransformersGenerator) -> None:
    tokenizer = generator.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not loop.last %}{{ 'Before: ' }}{% endif %}{{ m.content | upper }}\n{% endfor %}"
    )
    plain = talk(generator)
    with remembering(generator):
        assert talk(generator) == plain


def test_all_is_forgotten_at_the_end_and_after_a_failure(generator: TransformersGenerator) -> None:
    request = Request("a", say("Name a fruit."), 4, conversation="a")
    length = generator.prompt_length(request.messages)
    seen = shapes(generator.model)
    with remembering(generator):
        generator.generate([request], 0)
    with pytest.raises(RuntimeError, match="enough"), remembering(generator):
        generator.generate([request], 0)
        raise RuntimeError("enough")
    generator.generate([request], 0)
    assert [shape for shape in seen if shape[1] > 1] == [(1, length)] * 3


def test_a_generator_that_keeps_nothing_answers_turn_by_turn() -> None:
    scripted = ScriptedGenerator(lambda messages: f"{len(messages)}")
    with remembering(scripted, scripted):
        first = scripted.generate([Request("a", say("x"), 5, conversation="c")], 0)
        second = scripted.generate([Request("b", say("x", "1", "y"), 5, conversation="c")], 0)
    assert (first[0].text, second[0].text) == ("1", "3")
