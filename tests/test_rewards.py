"""What scores completions: functions are watched, reward models asked in batches."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.utils import get_callable_name, is_async_callable

from stagekit.errors import ConfigError, StageError
from stagekit.reward_models import score
from stagekit.rewards import AsyncWatched, ModelReward, Watched, as_reward


ROWS = {"prompts": ["one", "two", "three"], "completions": ["a", "b", "c"]}


def test_rewards_pass_as_numbers() -> None:
    def reward(prompts: Any, completions: Any, answer: list[int], **columns: Any) -> list[Any]:
        return [1, torch.tensor(0.5), None]

    assert Watched(reward)(**ROWS, answer=[1, 2, 3]) == [1.0, 0.5, None]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "high", torch.tensor([1.0, 2.0]), {}])
def test_what_is_no_number_names_its_row(bad: Any) -> None:
    reward = as_reward(lambda prompts, completions, **_: [1.0, bad, 1.0])
    with pytest.raises(StageError, match=r"no finite number\n  prompt: two\n  completion: b"):
        reward(**ROWS)


def test_a_function_that_raises_names_the_row_that_it_raises_on() -> None:
    def length(prompts: Any, completions: Any, limits: list[int], **columns: Any) -> list[float]:
        return [1 / limit for limit in limits]

    with pytest.raises(StageError, match=r"reward 'length' raised ZeroDivisionError.*\n  prompt: three") as caught:
        Watched(length)(**ROWS, limits=[1, 2, 0])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_raises_on_the_batch_alone_says_so() -> None:
    def pairs(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if len(prompts) == 3:
            raise RuntimeError("odd")
        return [0.0] * len(prompts)

    with pytest.raises(StageError, match="raised RuntimeError: odd; on single completions it does not"):
        Watched(pairs)(**ROWS)


@pytest.mark.parametrize(
    ("found", "message"), [([1.0], "returned 1 rewards for 3 completions"), (3.0, "not one number per completion")]
)
def test_another_number_of_rewards_is_an_error(found: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        Watched(lambda **_: found, "mine")(**ROWS)


def test_a_conversation_is_shown_as_its_turns() -> None:
    rows = {
        "prompts": [[{"role": "user", "content": "Hi?"}]],
        "completions": [[{"role": "assistant", "content": "Ho" * 300}]],
    }
    with pytest.raises(StageError, match=r"user: Hi\?\n  completion: assistant: Ho.*\.\.\. \(611 characters\)"):
        Watched(lambda **_: [math.nan])(**rows)


def test_a_coroutine_function_stays_one() -> None:
    async def judge(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [2.0 if prompt != "two" else math.nan for prompt in prompts]

    reward = as_reward(judge)
    assert isinstance(reward, AsyncWatched)
    assert is_async_callable(reward)
    assert get_callable_name(reward) == "judge"
    with pytest.raises(StageError, match="prompt: two"):
        asyncio.run(reward(**ROWS))


def test_a_reward_keeps_its_name_and_is_watched_once() -> None:
    def mine(**_: Any) -> list[float]:
        return []

    reward = as_reward(mine)
    assert as_reward(reward) is reward
    assert get_callable_name(reward) == "mine"
    assert not is_async_callable(reward)


def test_what_is_no_reward_is_refused() -> None:
    with pytest.raises(ConfigError, match="reward: 3 is no function"):
        as_reward(3)


@pytest.fixture
def reward_folder(tiny_model_path: str, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def test_a_reward_model_scores_as_it_does_by_itself(reward_folder: Path) -> None:
    reward = as_reward(str(reward_folder))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward_folder), None
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    expected = score(model, tokenizer, ROWS["prompts"], ROWS["completions"])
    assert reward(**ROWS) == pytest.approx(expected, rel=1e-5)
    assert get_callable_name(reward) == "rm"
    live = as_reward(model, tokenizer)
    assert live(**ROWS) == pytest.approx(expected, rel=1e-5)


def test_a_completion_that_the_reward_model_cannot_read_is_told(reward_folder: Path) -> None:
    reward = ModelReward(str(reward_folder), name="judge")
    with pytest.raises(StageError, match=r"reward 'judge': a completion does not fit(?s:.*)completion: word word"):
        reward(["one"], ["word " * 5000])
