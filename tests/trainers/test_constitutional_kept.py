"""Critique-revision with the tiny model: what it read stays in memory within a batch, and changes no text."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stagekit.generation import TransformersGenerator
from stagekit.requests import Completion, Request, Sampling, ScriptedGenerator
from stagekit.trainers.constitutional import Revisions
from tests.test_decoding import shapes, spread
from tests.trainers.scripted import ask, chat, records_of, run


SETTINGS: dict[str, Any] = {"rounds": 2, "max_new_tokens": 10, "max_critique_tokens": 6, "batch_tokens": 300}
PROMPTS = [
    *ask("Name a fruit.", "Is the earth round? Say why, in a few words.", "Hi", "What is ice made of?"),
    *ask("Name a fruit.", "Write a short greeting.", revised=False),
]


class Forgetful(TransformersGenerator):
    """Keeps nothing between turns."""

    @contextmanager
    def remembering(self) -> Iterator[None]:
        yield


def policy_of(tiny_model: Any, tiny_tokenizer: Any, temperature: float, kind: Any = TransformersGenerator) -> Any:
    return kind(tiny_model, tiny_tokenizer, Sampling(temperature), f"tiny at {temperature}")


def journal(path: Path) -> list[str]:
    return sorted(str(sorted(record.items())) for record in records_of(path))


@pytest.mark.parametrize("fewshot", [(), chat("Hello.", "Hello to you. " * 12)], ids=["plain", "few-shot"])
@pytest.mark.parametrize("critic", [False, True], ids=["own critic", "another critic"])
def test_the_greedy_texts_are_those_without_keeping_and_less_is_read(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, fewshot: Any, critic: bool
) -> None:
    seen, read = shapes(spread(tiny_model)), []
    for kind in (Forgetful, TransformersGenerator):
        given = {"policy": policy_of(tiny_model, tiny_tokenizer, 0.0, kind), "fewshot": fewshot, **SETTINGS}
        if critic:
            given["critic"] = policy_of(tiny_model, tiny_tokenizer, 0.0, kind)
        seen.clear()
        run(tmp_path, PROMPTS, name=kind.__name__, **given)
        read.append(sum(rows * tokens for rows, tokens in seen if tokens > 1))
    assert journal(tmp_path / "Forgetful") == journal(tmp_path / "TransformersGenerator")
    assert read[1] < (0.95 if critic else 0.75) * read[0]


class Dying(TransformersGenerator):
    """Is killed before a turn."""

    def __init__(self, *arguments: Any, life: int) -> None:
        super().__init__(*arguments)
        self.turns, self.life = itertools.count(), life

    def generate(self, requests: Any, seed: int) -> list[Completion]:
        if next(self.turns) == self.life:
            raise KeyboardInterrupt
        return super().generate(requests, seed)


def test_a_run_killed_before_any_turn_goes_on_to_the_same_texts(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Sampled: one other bit in a logit can be another token, and then another text."""

    def write(name: str, life: int) -> Revisions:
        policy = Dying(tiny_model, tiny_tokenizer, Sampling(1.0), "tiny", life=life)
        return run(tmp_path, PROMPTS[:3], policy=policy, name=name, **{**SETTINGS, "batch_tokens": 250})

    whole, turns = write("whole", 10**6), 0
    for turns in itertools.count():
        try:
            write(f"{turns}", turns)
            break
        except KeyboardInterrupt:
            assert write(f"{turns}", 10**6) == whole
            assert journal(tmp_path / f"{turns}") == journal(tmp_path / "whole")
    assert turns > 8


def test_a_critique_that_is_asked_for_again_goes_on_from_what_was_read(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """The first critique is made empty after the model has written it; the revision then follows the second."""

    class Silent(TransformersGenerator):
        def generate(self, requests: Any, seed: int) -> list[Completion]:
            written = super().generate(requests, seed)
            first = len(requests[0].messages) == 3 and seed not in silenced and len(silenced) == 0
            silenced.update([seed] if first else [])
            return [Completion("", (), "stop", one.prompt_tokens) if first else one for one in written]

    seen = shapes(tiny_model)
    silenced: set[int] = set()
    policy = Silent(tiny_model, tiny_tokenizer, Sampling(1.0), "tiny")
    revisions = run(tmp_path, ask("Name a fruit."), policy=policy, **{**SETTINGS, "rounds": 1})
    assert silenced and revisions.traces[0].rounds[0].critique is not None
    width = [tokens for rows, tokens in seen]
    first, again = [record for record in records_of(tmp_path / "journal.jsonl") if record["role"] == "critique"]
    assert first["n_prompt"] == again["n_prompt"] and first["seed"] != again["seed"]
    assert max(width[1:]) < again["n_prompt"]  # after the first answer, no conversation was read as a whole


def test_each_turn_names_its_conversation_and_has_its_own_seed(tmp_path: Path) -> None:
    asked: list[tuple[list[Request], int]] = []

    class Listening(ScriptedGenerator):
        def generate(self, requests: Any, seed: int) -> list[Completion]:
            asked.append((list(requests), seed))
            return super().generate(requests, seed)

    run(tmp_path, ask("A", "B"), policy=Listening(lambda messages: f"text {len(messages)}"), rounds=2)
    assert len(asked) == 5
    assert len({seed for _, seed in asked}) == 5
    assert len({tuple(request.conversation for request in requests) for requests, _ in asked}) == 1
    assert len({request.conversation for request in asked[0][0]}) == 2
