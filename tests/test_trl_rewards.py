"""TRL's own rewards by name: the names are TRL's, the options are checked before, the numbers are TRL's."""

import inspect
from pathlib import Path
from typing import Any, cast

import pytest
import trl.rewards

from stagekit import ConfigError, TrainingStage
from stagekit.custom import resolve
from stagekit.errors import StageError
from stagekit.groups import TRL_REWARDS, RewardSource
from stagekit.rejection import scorer_for
from stagekit.rewards import reward_of
from stagekit.trl_rewards import COMPARERS, MAKERS, options_of


THOUGHT = "<think>\nso\n</think>\nYes."


def reward(name: str, **options: Any) -> Any:
    declared = RewardSource(name, options=options)
    return reward_of(declared, resolve(declared.source))


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_the_names_are_those_of_trl() -> None:
    assert set(TRL_REWARDS) == {name for names in trl.rewards._import_structure.values() for name in names}
    assert {name for name in TRL_REWARDS if name.startswith("get_")} == MAKERS
    assert set(TRL_REWARDS) > COMPARERS
    assert RewardSource("think_format_reward").source == "trl.rewards:think_format_reward"


@pytest.mark.parametrize("name", TRL_REWARDS)
def test_the_options_read_from_the_source_are_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(trl.rewards, name)).parameters
    found = options_of(name)
    assert set(found) <= set(parameters)
    assert {one: parameters[one].default is inspect.Parameter.empty for one in found} == found


@pytest.mark.parametrize("form", [str, turns])
def test_completions_are_texts_or_conversations(form: Any) -> None:
    found = reward("think_format_reward")(prompts=["?", "?"], completions=[form(THOUGHT), form("Yes.")])
    assert found == [1.0, 0.0]
    assert reward("think_format_reward").__name__ == "think_format_reward"


def test_answers_are_compared_with_the_solution() -> None:
    pytest.importorskip("math_verify")
    given = {"prompts": ["?"] * 3, "solution": [r"\frac{1}{3}", r"\frac{1}{3}", "none of it is maths"]}
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{2}", r"\boxed{2}"]
    assert reward("accuracy_reward")(completions=texts, **given) == [1.0, 0.0, None]
    ended = reward("reasoning_accuracy_reward", reasoning_delimiters=["THEN"])
    assert ended(completions=[f"hm THEN {text}" for text in texts], **given) == [1.0, 0.0, None]


def test_what_makes_a_reward_is_given_its_options() -> None:
    long = reward("get_soft_overlong_punishment", max_completion_len=10, soft_punish_cache=5)
    ids = [[1] * 5, [1] * 8, [1] * 11]
    assert long(prompts=["?"] * 3, completions=["a"] * 3, completion_ids=ids) == pytest.approx([0, -0.6, -1])
    again = reward("get_repetition_penalty_reward", ngram_size=2)
    assert again(prompts=["?"], completions=["a"], completion_ids=[[5] * 5]) == [-0.75]
    assert again.__name__ == "repetition_penalty_reward"


def test_a_value_that_trl_refuses_is_an_error_of_the_declaration() -> None:
    with pytest.raises(ConfigError, match=r"get_repetition_penalty_reward: options.*should not be positive"):
        reward("get_repetition_penalty_reward", max_penalty=1.0)


def test_what_it_raises_names_the_prompt_and_the_completion() -> None:
    with pytest.raises(StageError, match=r"reward 'accuracy_reward' raised(?s:.*)prompt: What\?\n  completion: 5"):
        reward("accuracy_reward")(prompts=["What?"], completions=["5"])


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"source": "get_soft_overlong_punishment", "options": {"max_completion_len": 5}},
         r"method\.reward\.options\.soft_punish_cache: missing"),
        ({"source": "think_format_reward", "options": {"tag": "x"}},
         r"method\.reward\.options\.tag: think_format_reward has no such option; it has none"),
        ({"source": "reasoning_accuracy_reward", "options": {"reasoning_delimiter": ["x"]}},
         r"did you mean 'reasoning_delimiters'"),
        ({"source": "accuracy_rewards"}, "") ,
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_told_before_anything_is_loaded(declared: dict[str, Any], message: str) -> None:
    if not message:
        assert RewardSource(declared["source"]).source == "accuracy_rewards"  # the id of a model on a hub
        return
    with pytest.raises(ConfigError, match=message):
        TrainingStage(name="s", training_data="x.jsonl", method={"type": "grpo", "reward": declared})


def test_rejection_sampling_takes_those_that_read_texts(tmp_path: Path) -> None:
    def stage(source: str, **options: Any) -> TrainingStage:
        method = {"type": "rejection_sampling", "reward": {"source": source, "options": options}}
        return TrainingStage(name="s", training_data="x.jsonl", method=method)

    (declared,) = stage("think_format_reward").method.reward  # type: ignore[union-attr]
    scorer: Any = scorer_for(cast(Any, None), [declared], "here")
    assert scorer.score(["?", [{"role": "user", "content": "?"}]], [THOUGHT, "no"], {}) == [1.0, 0.0]
    assert scorer.fingerprint.startswith("trl.rewards.format_rewards:think_format_reward ")
    with pytest.raises(ConfigError, match=r"method\.reward: what TRL's get_ functions make counts tokens"):
        stage("get_repetition_penalty_reward")
