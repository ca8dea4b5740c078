"""The base models: small Llamas that answer, often wrongly, and have the critic's skills; and a larger teacher.

    python -m benchmarks.world.base --seed 11          # build a base, benchmarks/world/bases/11
    python -m benchmarks.world.base --teacher          # build the teacher, which answers rightly
    python -m benchmarks.world.base --check            # measure the skills of what is built, against the pass lines

A base learns from demonstrations of which a share is flawed, so it knows right and wrong behaviour of every family:
that is the headroom of every method. It sees no item of the development and test splits, none of the held-out
phrasings, and of the held-out things only whether they are dangerous.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.world import tokenizer as words
from benchmarks.world.check import check
from benchmarks.world.families import FAMILIES, flawed, good
from benchmarks.world.hashes import write_hashes
from benchmarks.world.skills import (
    Example,
    asking_example,
    judge_example,
    knowledge_example,
    one_question,
    revision_example,
)
from benchmarks.world.world import TRAINED


BASES = Path(__file__).parent / "bases"
FLAWS = {
    "arithmetic": 0.5, "sorting": 0.5, "harmful": 0.65, "harmless": 0.2, "review": 0.5, "style": 0.6, "known": 0.25,
    "unknown": 0.65, "steps": 0.5,
}  # fmt: skip
"""Share of flawed demonstrations that a base learns from."""
CRITIC_ERRORS = 0.25
"""Share of wrong critiques among those that the base learns to follow. It does not learn to write them."""


@dataclass(frozen=True)
class Recipe:
    """How a model is built: its shape, what it reads, and for how long."""

    hidden: int
    layers: int
    steps: int
    flaws: Mapping[str, float]
    skills: bool
    batch: int = 64
    examples: int = 96000
    learning_rate: float = 3e-3
    further: int = 0
    """Steps of a second, gentler pass, from the weights as they are saved."""


BASE = Recipe(hidden=64, layers=3, steps=6400, batch=32, examples=160000, flaws=FLAWS, skills=True)
LONGER = {12: replace(BASE, further=3000)}
"""Recipes of bases that miss a pass line without a second pass: 12 followed a wrong critique in 0.893 of cases."""
TEACHER = Recipe(hidden=112, layers=4, steps=2500, flaws=dict.fromkeys(FLAWS, 0.0), skills=False, further=600)


def examples(rng: Random, recipe: Recipe) -> Iterator[Example]:
    """What the model reads: demonstrations and knowledge; a base also critiques with revisions, and comparisons.

    The teacher learns to make up questions instead.
    """
    weights = {"demonstration": 58, "revision": 20, "judge": 12, "knowledge": 10}
    if not recipe.skills:
        weights = {"demonstration": 82, "knowledge": 8, "asking": 10}
    critic = ("harmful", "harmful", "harmless", "review", "known", "unknown", "unknown", "arithmetic", "style")
    for kind in rng.choices(list(weights), list(weights.values()), k=recipe.examples):
        if kind == "demonstration":
            family = rng.choice(("arithmetic", "arithmetic", "harmless", *FAMILIES))
            question = one_question(rng, family, "train")
            answer = (flawed if rng.random() < recipe.flaws[family] else good)(question, rng)
            yield Example((question.text, answer), (False, True))
        elif kind == "revision":
            yield revision_example(rng, "train", rng.choice(critic), CRITIC_ERRORS)
        elif kind == "judge":
            yield judge_example(rng, "train", rng.choice([name for name in TRAINED if name != "arithmetic"]))
        elif kind == "asking":
            yield asking_example(rng)
        else:
            yield knowledge_example(rng)


def encode(tokenizer: Any, given: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
    """Token ids and which of them are learnt, of each example, as the chat template lays them out."""
    texts = sorted({turn for example in given for turn in example.turns})
    ids = dict(zip(texts, tokenizer(texts).input_ids, strict=True))
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    rows = []
    for example in given:
        row: list[int] = []
        mask: list[bool] = []
        for place, (turn, learn) in enumerate(zip(example.turns, example.learn, strict=True)):
            row += [assistant if place % 2 else user, *ids[turn], end]
            mask += [False] + [learn] * (len(ids[turn]) + 1)
        rows.append((row, mask))
    return rows


def batches(
    rows: Sequence[tuple[list[int], list[bool]]], recipe: Recipe, rng: Random, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of rows of similar length: token ids and mask, each (B, T)."""
    while True:
        order = sorted(range(len(rows)), key=lambda place: (len(rows[place][0]), rng.random()))
        groups = [order[start : start + recipe.batch] for start in range(0, len(order), recipe.batch)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(rows[place][0]) for place in group)
            ids = torch.tensor([rows[place][0] + [pad] * (width - len(rows[place][0])) for place in group])
            mask = torch.tensor([rows[place][1] + [False] * (width - len(rows[place][1])) for place in group])
            yield ids, mask


def new_model(tokenizer: Any, recipe: Recipe, seed: int) -> Any:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def train(model: Any, tokenizer: Any, recipe: Recipe, seed: str) -> None:
    """Plain next-token training on the learnt turns; the logits of no other token are computed."""
    rng = Random(f"base/{seed}")
    rows = encode(tokenizer, list(examples(rng, recipe)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    feed = batches(rows, recipe, rng, tokenizer.pad_token_id)
    start, mean = time.process_time(), 0.0
    for step in range(recipe.steps):
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate * recipe.learning_rate
        ids, mask = next(feed)
        wanted = mask[:, 1:]
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][wanted]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.item() if step == 0 else 0.99 * mean + 0.01 * loss.item()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1:5d}  loss {mean:.3f}  {time.process_time() - start:.0f} CPU seconds", flush=True)


def further(model: Any, tokenizer: Any, recipe: Recipe, seed: int) -> None:
    """The second pass, with examples of its own and a third of the learning rate."""
    again = replace(
        recipe,
        steps=recipe.further,
        examples=recipe.further * recipe.batch,
        learning_rate=recipe.learning_rate / 3,
    )
    train(model, tokenizer, again, f"{seed}/further")


def build(folder: Path, recipe: Recipe, seed: int) -> None:
    """Build a model and save it with its tokenizer, its weights in 16 bits."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = words.build()
    model = new_model(tokenizer, recipe, seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,d} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, recipe, str(seed))
    if recipe.further:
        further(model.half().float(), tokenizer, recipe, seed)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Build or check, as asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="build the base of this seed")
    what.add_argument("--teacher", action="store_true", help="build the teacher")
    what.add_argument("--check", action="store_true", help="measure the skills of all that is built")
    parser.add_argument("--output-dir", type=Path, default=BASES, help="where the models lie")
    given = parser.parse_args()
    if given.check:
        raise SystemExit(check(given.output_dir))
    name = "teacher" if given.teacher else str(given.seed)
    recipe = TEACHER if given.teacher else LONGER.get(given.seed, BASE)
    build(given.output_dir / name, recipe, 0 if given.teacher else given.seed)
    print(json.dumps(write_hashes(given.output_dir), indent=1))


if __name__ == "__main__":
    main()
