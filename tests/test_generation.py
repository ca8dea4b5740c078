"""Generation with the tiny model: batches change nothing, and nothing is left changed."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stagekit.errors import ConfigError, Interrupted
from stagekit.fingerprints import tokenizer_fingerprint, weights_fingerprint
from stagekit.generation import TransformersGenerator
from stagekit.requests import Completion, Generator, Message, Request, Sampling, ScriptedGenerator, plan_batches


GREEDY = Sampling(temperature=0)
TEXTS = ("Name a fruit.", "What is the opposite of hot? Say it in one word, please.", "Hi", "Is the earth round?")


def say(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def requests_of(*texts: str, max_new_tokens: int = 12) -> list[Request]:
    return [Request(text, say(text), max_new_tokens) for text in texts]


@pytest.fixture
def generator(tiny_model: Any, tiny_tokenizer: Any) -> TransformersGenerator:
    return TransformersGenerator(tiny_model, tiny_tokenizer, GREEDY, "tiny")


def spread_logits(model: Any) -> None:
    """Make the random model's next token clear-cut, so that a greedy comparison does not hang on rounding."""
    with torch.no_grad():
        model.model.norm.weight.mul_(20)


def test_a_batch_answers_as_its_rows_alone(generator: TransformersGenerator) -> None:
    spread_logits(generator.model)
    requests = requests_of(*TEXTS)
    together = generator.generate(requests, seed=0)
    alone = [generator.generate([request], seed=0)[0] for request in requests]
    assert together == alone
    assert len({completion.prompt_tokens for completion in together}) > 1  # so that padding was needed
    assert len({completion.token_ids for completion in together}) > 1


def test_each_row_is_cut_at_its_own_length(generator: TransformersGenerator) -> None:
    generator.model.generation_config.eos_token_id = None
    generator.tokenizer.eos_token = None
    long, short = Request("long", say("Hi"), 9), Request("short", say("Hi"), 3)
    nine, three = generator.generate([long, short], seed=0)
    assert (len(nine.token_ids), len(three.token_ids)) == (9, 3)
    assert nine.token_ids[:3] == three.token_ids
    assert nine.finish_reason == three.finish_reason == "length"


def force(model: Any, token: int, at: int) -> None:
    """Make `model` emit `token` as its new token number `at`, and never before, by its logits."""
    head, steps = model.lm_head, {"count": 0}

    def hook(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        steps["count"] += 1
        logits = logits.clone()
        logits[..., [2, 17, token]] = -1e4
        if steps["count"] == at:
            logits[..., token] = 1e4
        return logits

    head.register_forward_hook(hook)


@pytest.mark.parametrize("source", ["tokenizer", "generation config"])
def test_any_eos_ends_a_text_and_is_not_part_of_it(generator: TransformersGenerator, source: str) -> None:
    spread_logits(generator.model)
    eos = generator.tokenizer.eos_token_id if source == "tokenizer" else 17
    generator.model.generation_config.eos_token_id = [17]
    force(generator.model, eos, at=4)
    [completion] = generator.generate(requests_of("Name a fruit."), seed=0)
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) == 3 and eos not in completion.token_ids
    assert completion.text == generator.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_an_eos_after_a_rows_own_limit_does_not_count(generator: TransformersGenerator) -> None:
    generator.model.generation_config.eos_token_id = None
    force(generator.model, generator.tokenizer.eos_token_id, at=4)
    kept = [Request("a", say("Hi"), 4), Request("b", say("Hi"), 3)]
    assert [c.finish_reason for c in generator.generate(kept, seed=0)] == ["stop", "length"]


def test_prompts_go_through_the_chat_template(generator: TransformersGenerator) -> None:
    tokenizer = generator.tokenizer
    text = tokenizer.apply_chat_template(list(say("Hi")), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    seen: list[torch.Tensor] = []
    embed = generator.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    [completion] = generator.generate(requests_of("Hi"), seed=0)
    assert seen[0].tolist() == [ids]
    assert completion.prompt_tokens == len(ids) == generator.prompt_length(say("Hi"))
    assert all(step.shape[1] == 1 for step in seen[1:])  # the KV cache is on


def test_a_conversation_is_laid_out_once_for_its_length_and_its_text(
    generator: TransformersGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out: list[Any] = []
    original = generator.prompt_ids
    monkeypatch.setattr(generator, "prompt_ids", lambda messages: laid_out.append(messages) or original(messages))
    lengths = [generator.prompt_length(say(text)) for text in TEXTS]
    written = generator.generate(requests_of(*TEXTS, max_new_tokens=2), seed=0)
    assert len(laid_out) == len(TEXTS)
    assert [one.prompt_tokens for one in written] == lengths
    generator.tokenizer.chat_template += "and more"
    assert generator.prompt_length(say(TEXTS[0])) > lengths[0]  # another template is another prompt
    monkeypatch.setattr("stagekit.generation.LAID_OUT", len(generator._laid_out))
    for text in TEXTS:
        generator.prompt_length(say(f"{text} {text}"))
    assert len(generator._laid_out) == len(TEXTS) + 1
    assert generator.prompt_length(say(TEXTS[0])) > lengths[0]


def test_a_tokenizer_without_a_template_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        TransformersGenerator(tiny_model, tiny_tokenizer, GREEDY, "tiny")


def test_nothing_is_left_changed_even_after_a_failure(generator: TransformersGenerator) -> None:
    model = generator.model
    model.train()
    model.model.layers[0].eval()  # a frozen layer that its owner keeps in eval mode
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    config, side = model.generation_config, generator.tokenizer.padding_side
    modes = [module.training for module in model.modules()]
    seen: list[tuple[bool, bool, bool]] = []

    def look(module: Any, _inputs: Any) -> None:
        checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        seen.append((any(part.training for part in model.modules()), checkpointing, torch.is_grad_enabled()))
        if len(seen) > 5:
            raise RuntimeError("out of memory")

    model.model.register_forward_pre_hook(look)
    generator.generate(requests_of("Hi", max_new_tokens=2), seed=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        generator.generate(requests_of("Hi"), seed=0)
    assert set(seen) == {(False, False, False)}
    assert [module.training for module in model.modules()] == modes
    assert model.is_activation_checkpointing
    assert model.config.use_cache is False
    assert model.generation_config is config
    assert generator.tokenizer.padding_side == side
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_model_can_be_trained_afterwards(generator: TransformersGenerator) -> None:
    generator.generate(requests_of("Hi"), seed=0)
    ids = torch.tensor([generator.prompt_ids(say("Hi"))])
    generator.model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in generator.model.parameters())


def test_the_callers_random_state_stays(tiny_model: Any, tiny_tokenizer: Any) -> None:
    generator = TransformersGenerator(tiny_model, tiny_tokenizer, Sampling(1.0), "tiny")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    python = random.getstate()
    first = generator.generate(requests_of(*TEXTS), seed=1)
    assert torch.equal(torch.rand(4), expected)
    assert random.getstate() == python
    assert generator.generate(requests_of(*TEXTS), seed=1) == first
    assert generator.generate(requests_of(*TEXTS), seed=2) != first


def test_the_checkpoints_own_sampling_flags_play_no_part(generator: TransformersGenerator) -> None:
    plain = generator.generate(requests_of(*TEXTS), seed=0)
    config = generator.model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.min_new_tokens = True, 5.0, 9.0, 12
    assert generator.generate(requests_of(*TEXTS), seed=0) == plain


def test_a_low_temperature_is_greedy_in_the_limit(tiny_model: Any, tiny_tokenizer: Any) -> None:
    spread_logits(tiny_model)
    greedy = TransformersGenerator(tiny_model, tiny_tokenizer, GREEDY, "tiny").generate(requests_of("Hi"), 0)
    for sampling in (Sampling(1e-4), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)):
        assert (
            TransformersGenerator(tiny_model, tiny_tokenizer, sampling, "t").generate(requests_of("Hi"), 5) == greedy
        )


def test_autocast_runs_float32_weights_in_bfloat16(tiny_model: Any, tiny_tokenizer: Any) -> None:
    types: list[torch.dtype] = []
    tiny_model.lm_head.register_forward_hook(lambda _m, _i, logits: types.append(logits.dtype))
    generator = TransformersGenerator(tiny_model, tiny_tokenizer, GREEDY, "tiny", torch.bfloat16)
    generator.generate(requests_of("Hi", max_new_tokens=2), seed=0)
    assert set(types) == {torch.bfloat16}
    assert {parameter.dtype for parameter in tiny_model.parameters()} == {torch.float32}


def test_a_bfloat16_model_generates_in_batches(tiny_model_path: str, tiny_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16)
    completions = TransformersGenerator(model, tiny_tokenizer, GREEDY, "b").generate(requests_of(*TEXTS), 0)
    assert [completion.prompt_tokens > 0 for completion in completions] == [True] * 4


def test_a_peft_model_generates_with_its_adapter_and_stays_as_it_was(tiny_model: Any, tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = tiny_model.generation_config
    base = TransformersGenerator(tiny_model, tiny_tokenizer, GREEDY, "t").generate(requests_of("Hi"), 0)
    model = get_peft_model(tiny_model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.5)
    adapted = TransformersGenerator(model, tiny_tokenizer, GREEDY, "t").generate(requests_of("Hi"), 0)
    assert adapted != base
    assert model.get_base_model().generation_config is config
    assert model.generation_config is config


def test_a_fingerprint_sees_one_changed_weight(tiny_model: Any, tiny_tokenizer: Any) -> None:
    before = weights_fingerprint(tiny_model)
    assert weights_fingerprint(tiny_model) == before
    with torch.no_grad():
        tiny_model.model.norm.weight[0] += 1e-3
    assert weights_fingerprint(tiny_model) != before
    tokenizer = tokenizer_fingerprint(tiny_tokenizer)
    tiny_tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tiny_tokenizer) != tokenizer


def test_batches_are_longest_first_and_within_the_budget() -> None:
    requests = [Request(f"k{number}", (), 10) for number in range(20)]
    lengths = {request.key: 5 + 3 * (number % 7) for number, request in enumerate(requests)}
    batches = plan_batches(requests, lengths, 100)
    assert sorted(request.key for batch in batches for request in batch) == sorted(lengths)
    flat = [lengths[request.key] for batch in batches for request in batch]
    assert flat == sorted(flat, reverse=True)
    for batch, following in zip(batches, [*batches[1:], ()], strict=True):
        longest = max(lengths[request.key] for request in batch)
        assert len(batch) * (longest + 10) <= 100
        assert not following or (len(batch) + 1) * (longest + 10) > 100
    assert plan_batches(requests[::-1], lengths, 100) == batches


def test_a_request_over_the_budget_is_a_batch_alone() -> None:
    requests = [Request("a", (), 10), Request("b", (), 10)]
    batches = plan_batches(requests, {"a": 500, "b": 400}, 100)
    assert [[request.key for request in batch] for batch in batches] == [["a"], ["b"]]
    assert plan_batches([], {}, 100) == []


def test_the_largest_number_of_new_tokens_counts_for_the_whole_batch() -> None:
    requests = [Request("a", (), 1), Request("b", (), 40)]
    assert len(plan_batches(requests, {"a": 10, "b": 9}, 99)) == 2
    assert len(plan_batches(requests, {"a": 10, "b": 9}, 100)) == 1


def test_a_scripted_generator_answers_by_its_function_and_keeps_the_calls() -> None:
    given = Completion("cut", (1,), "length", 7)
    generator = ScriptedGenerator(lambda messages: given if messages == say("b") else "one two")
    assert isinstance(generator, Generator)
    first, second = generator.generate([Request("k", say("a"), 5), Request("l", say("b"), 5)], seed=0)
    assert first == Completion("one two", (0, 1), "stop", 2)
    assert second is given
    assert generator.calls == [[say("a"), say("b")]]


def test_every_token_of_a_batch_is_told(tiny_model: Any, tiny_tokenizer: Any) -> None:
    told: list[tuple[int, int, int]] = []
    generator = TransformersGenerator(
        tiny_model, tiny_tokenizer, Sampling(temperature=0.0), "f", on_token=lambda *beat: told.append(beat)
    )
    requests = [Request(str(n), ({"role": "user", "content": f"Say {n}"},), 6) for n in range(3)]
    longest = max(len(completion.token_ids) for completion in generator.generate(requests, seed=0))
    assert told[0] == (3, 1, 6)
    assert [tokens for _, tokens, _ in told] == list(range(1, len(told) + 1))
    assert longest <= len(told) <= 6


def test_what_the_teller_raises_ends_the_batch_and_the_model_is_as_before(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    def leave(rows: int, tokens: int, most: int) -> None:
        raise Interrupted("enough")

    tiny_model.train()
    before = tiny_model.generation_config
    generator = TransformersGenerator(tiny_model, tiny_tokenizer, Sampling(), "f", on_token=leave)
    with pytest.raises(Interrupted):
        generator.generate([Request("a", ({"role": "user", "content": "Say"},), 4)], seed=0)
    assert tiny_model.training
    assert tiny_model.generation_config is before
