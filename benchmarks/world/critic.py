"""A scripted critic in the place of a model's own: the model answers and revises, the script criticises."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.world.families import FAMILIES, Question
from benchmarks.world.measure import MAX_NEW_TOKENS, writer
from benchmarks.world.skills import principle_in, scripted_critique
from benchmarks.world.world import items_of
from stagekit.counters import seed_of
from stagekit.requests import Completion, Message


def backend(
    folder: str, errors: float, seed: int, temperature: float = 1.0
) -> Callable[[tuple[Message, ...]], Completion]:
    """What answers in the constitutional stage: requests for a critique by the script, all others by the model.

    The draws of an answer depend on the conversation and the seed alone, not on the order of the calls.

    Args:
        folder: the model's.
        errors: the share of critiques that are wrong; 1: all.
        temperature: of the model's answers.
    """
    generator = writer(folder, temperature)
    asked = _questions(("harmful", "harmless"))

    def reply(messages: tuple[Message, ...]) -> Completion:
        drawn = seed_of(seed, *(message["content"] for message in messages))
        principle = principle_in(messages[-1]["content"])
        if principle is None:
            return _sample(generator, messages, drawn, temperature)
        question = asked[messages[-3]["content"]]
        said = scripted_critique(question, messages[-2]["content"], principle, errors, Random(drawn))
        return Completion(said, tuple(generator.tokenizer(said).input_ids), "stop", 0)

    return reply


def _questions(families: Sequence[str]) -> dict[str, Question]:
    """Every training question of the families by its text."""
    return {
        text: Question(family, item, text)
        for family in families
        for item in items_of(family, "train")
        for text in FAMILIES[family].phrasings(item)
    }


@torch.no_grad()
def _sample(generator: Any, messages: Sequence[Message], seed: int, temperature: float) -> Completion:
    """One answer. A loop of our own: for one conversation it is much faster than `generate`."""
    draws = torch.Generator().manual_seed(seed)
    prompt = generator.prompt_ids(messages)
    ids, cache, new = torch.tensor([prompt]), DynamicCache(), []
    while len(new) < MAX_NEW_TOKENS:
        logits = generator.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws))
        if token == generator.tokenizer.eos_token_id:
            return Completion(generator.tokenizer.decode(new), tuple(new), "stop", len(prompt))
        new.append(token)
        ids = torch.tensor([[token]])
    return Completion(generator.tokenizer.decode(new), tuple(new), "length", len(prompt))
