"""Rewards of answers: functions with TRL's signature, reward models, weighted sums, and what stops a run."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from stagekit.errors import ConfigError, StageError
from stagekit.scorers import FunctionScorer, ModelScorer, Scorer, free, scorer_from


ASKED = [{"role": "user", "content": "How many?"}]


def length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(text if isinstance(text, str) else text[0]["content"])) for text in completions]


def right(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    texts = [text[0]["content"] for text in completions]
    return [None if wanted is None else float(wanted in text) for text, wanted in zip(texts, answer, strict=True)]


def only_named(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
    return [float(one == "4") for one in answer]


class Instance:
    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return [7.0] * len(completions)


@pytest.fixture
def reward_model(tiny_model_path: str, tiny_tokenizer: Any, tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(tmp_path / "rm")
    tiny_tokenizer.save_pretrained(tmp_path / "rm")
    return str(tmp_path / "rm")


def test_answers_to_texts_are_texts_and_answers_to_conversations_are_conversations() -> None:
    seen: list[Any] = []

    def look(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(completions)

    scorer = FunctionScorer(look)
    scorer.score(["How many?"], ["Four."], {})
    scorer.score([ASKED], ["Four."], {})
    assert seen == [(["How many?"], ["Four."]), ([ASKED], [[{"role": "assistant", "content": "Four."}]])]
    assert scorer.score([], [], {}) == [] and len(seen) == 2


def test_columns_reach_the_function_by_name() -> None:
    columns = {"answer": ["4", "5", None], "source": ["a", "b", "c"]}
    assert FunctionScorer(right).score([ASKED] * 3, ["4", "4", "4"], columns) == [1.0, 0.0, None]
    assert FunctionScorer(only_named).score([ASKED] * 3, ["4", "4", "4"], columns) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("gives", "wrong"),
    [
        (lambda prompts, completions: [1.0, float("nan")], r"gave nan.*\n  prompt: Q2\n  completion: two"),
        (lambda prompts, completions: [1.0, float("inf")], r"gave inf.*\n  prompt: Q2"),
        (lambda prompts, completions: [1.0, "good"], r"gave 'good', no finite number\n.*\n  completion: two"),
        (lambda prompts, completions: [1.0], "1 rewards for 2 completions"),
        (lambda prompts, completions: 1.0, "not one number per completion"),
        (
            lambda prompts, completions: [1 / (one != "two") for one in completions],
            r"raised ZeroDivisionError.*\n  prompt: Q2\n  completion: two",
        ),
    ],
    ids=["nan", "infinity", "a word", "too few", "no list", "raises on one of them"],
)
def test_a_reward_that_fails_stops_with_the_prompt_and_the_answer(gives: Any, wrong: str) -> None:
    with pytest.raises(StageError, match=wrong):
        FunctionScorer(gives).score(["Q1", "Q2"], ["one", "two"], {})


def test_a_coroutine_function_is_waited_for() -> None:
    async def later(prompts: list[Any], completions: list[Any], base: float, **columns: Any) -> list[float]:
        return [base + len(one) for one in completions]

    def scored() -> list[float | None]:
        return FunctionScorer(later, {"base": 1.0}).score(["Q", "R"], ["a", "bc"], {"base": [7, 7]})

    async def in_a_notebook() -> list[float | None]:
        return scored()

    assert scored() == asyncio.run(in_a_notebook()) == [2.0, 3.0]


def test_tensors_and_booleans_are_numbers() -> None:
    scorer = FunctionScorer(lambda prompts, completions: torch.tensor([0.5, 1.0]))
    assert scorer.score(["Q", "R"], ["a", "b"], {}) == [0.5, 1.0]
    assert FunctionScorer(lambda prompts, completions: [True, None]).score(["Q", "R"], ["a", "b"], {}) == [1.0, None]


def test_a_reward_model_scores_through_its_template_whatever_the_order(reward_model: str) -> None:
    scorer = ModelScorer(reward_model)
    answers = ["Yes.", "No, I do not think so at all.", "Perhaps.", "word " * 3000]
    found = scorer.score([ASKED] * 4, answers, {})
    assert found[3] is None  # longer than its context: not cut in silence
    again = ModelScorer(reward_model).score([ASKED] * 4, answers[::-1], {})[::-1]
    assert found[:3] == pytest.approx(again[:3], abs=1e-5)
    assert len(set(found)) == 4
    assert scorer.score(["How many?"], ["Yes."], {}) == pytest.approx(found[:1], abs=1e-5)


def test_a_models_memory_is_given_back_and_taken_again(reward_model: str) -> None:
    scorer = scorer_from([reward_model])
    first = scorer.score([ASKED], ["Yes."], {})
    free(scorer)
    [(part, _)] = scorer.parts  # type: ignore[attr-defined]
    assert part._loaded is None
    assert scorer.score([ASKED], ["Yes."], {}) == first


def test_a_list_is_a_weighted_sum_of_those_that_have_a_reward() -> None:
    scorer = scorer_from([(length, 0.5), right])
    rows = ["four", "4"]
    assert scorer.score([ASKED] * 2, rows, {"answer": ["4", "4"]}) == [0.5 * 4 + 0.0, 0.5 * 1 + 1.0]
    assert scorer.score([ASKED] * 2, rows, {"answer": [None, "4"]}) == [2.0, 1.5]
    assert scorer_from([right]).score([ASKED], ["4"], {"answer": [None]}) == [None]


def test_every_way_to_name_a_reward_finds_it(reward_model: str, tmp_path: Path) -> None:
    assert scorer_from("tests.answers:by_length").score([ASKED], ["four"], {}) == [4.0]
    assert isinstance(scorer_from(reward_model), ModelScorer)
    assert isinstance(scorer_from(Path(reward_model)), ModelScorer)
    assert scorer_from(Instance()).score([ASKED], ["four"], {}) == [7.0]
    own = FunctionScorer(length)
    assert scorer_from(own) is own and isinstance(own, Scorer)
    for strange in (3, [], None, torch.nn.Linear):
        if strange is not torch.nn.Linear:
            with pytest.raises(ConfigError, match="a reward is a function"):
                scorer_from(strange)
    with pytest.raises(ConfigError):
        scorer_from(str(tmp_path / "nowhere"))


def test_a_fingerprint_names_the_reward(reward_model: str) -> None:
    prints = [
        scorer_from(one).fingerprint for one in (length, right, Instance(), reward_model, [length], [(length, 2)])
    ]
    assert len(set(prints)) == len(prints)
    assert scorer_from(length).fingerprint == prints[0]
    assert prints[0].startswith(f"{__name__}:length ")
