"""What a model scores: its sampled answers to the held-out questions, family by family."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.world.families import Question, score
from benchmarks.world.rows import questions_of
from benchmarks.world.world import Split, World
from stagekit.counters import seed_of
from stagekit.models import load_policy, load_tokenizer
from stagekit.requests import Message, Request, Sampling


MAX_NEW_TOKENS = 28
BATCH = 256
QUESTIONS = 200
"""Held-out questions of each family in a measurement."""


def writer(folder: str | Path, temperature: float = 1.0) -> Any:
    """A generator of a saved model's texts, at temperature 1 unless told otherwise."""
    import torch

    from stagekit.generation import TransformersGenerator

    model = load_policy(str(folder), dtype=torch.float32)
    return TransformersGenerator(
        model.eval(), load_tokenizer(str(folder), None), Sampling(temperature=temperature), fingerprint=str(folder)
    )


def write(generator: Any, conversations: Sequence[Sequence[Message]], seed: int) -> list[str]:
    """One answer to each conversation, in their order; conversations of similar length go together."""
    lengths = [generator.prompt_length(one) for one in conversations]
    order = sorted(range(len(conversations)), key=lambda place: lengths[place])
    texts = [""] * len(conversations)
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        requests = [Request(str(place), tuple(conversations[place]), MAX_NEW_TOKENS) for place in group]
        for place, done in zip(group, generator.generate(requests, seed_of(seed, str(start))), strict=True):
            texts[place] = done.text.strip()
    return texts


def answers(generator: Any, questions: Sequence[Question], seed: int) -> list[str]:
    """One sampled answer to each question."""
    return write(generator, [question.prompt for question in questions], seed)


def measure(folder: str | Path, world: World, split: Split, n: int = QUESTIONS) -> dict[str, float]:
    """The mean score of each family, of sampled answers to `n` held-out questions."""
    held_out = world.held_out(split, n)
    return scores(held_out, answers(writer(folder), questions_of(held_out), world.seed))


def scores(held_out: Mapping[str, Sequence[Question]], texts: Sequence[str]) -> dict[str, float]:
    """Mean scores by family, of one answer to each question in their order."""
    left = iter(texts)
    return {
        family: fmean(score(question, next(left)) for question in questions) for family, questions in held_out.items()
    }


def nll(folder: str | Path, demonstrations: Sequence[Mapping[str, Any]], batch: int = 64) -> float:
    """Nats of the completions of demonstrations, their ends included, a mean over the rows."""
    import torch

    generator = writer(folder)
    template = generator.tokenizer.apply_chat_template
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(demonstrations), batch):
            part = demonstrations[start : start + batch]
            whole = [
                list(template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]) for row in part
            ]
            asked = [len(generator.prompt_ids(row["prompt"])) for row in part]
            width = max(map(len, whole))
            ids = torch.tensor([one + [0] * (width - len(one)) for one in whole])
            mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in whole])
            chances = generator.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            said = chances[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            total -= sum(
                float(row[first - 1 : len(one) - 1].sum()) for row, first, one in zip(said, asked, whole, strict=True)
            )
    return total / len(demonstrations)
