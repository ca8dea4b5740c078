"""Online DPO stages through pipelines on the tiny model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import ConfigError, StageError, TrainingStage
from stagekit.adapters import OnlineDPO, Reward
from stagekit.groups import Generation, LoRA
from tests.running import CrashError, crash_at, lines, run, same, stage
from tests.test_reward_models import pairs


Write = Callable[..., Path]


def vowels(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """How many vowels an answer has, a quarter each."""
    return [sum(letter in "aeiou" for letter in turns[0]["content"]) / 4 for turns in completions]


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any]) -> dict[str, str]:
    return {
        "prompts": str(write_rows([{"prompt": row["prompt"]} for row in sft_rows], "prompts.jsonl")),
        "pairs": str(write_rows(pairs(32, 0), "pairs.jsonl")),
    }


def online(data: dict[str, str], reward: Any = vowels, **options: Any) -> TrainingStage:
    own = {key: options.pop(key) for key in list(options) if key in OnlineDPO.model_fields}
    method = OnlineDPO(reward=reward, **own)
    return stage("online", data["prompts"], method, generation=Generation(max_new_tokens=6), **options)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_a_stage_starts_at_ln_2_and_leaves_a_policy(
    lora: LoRA | None, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path / "run", online(data, lora=lora, preference_scale=1.0, max_steps=3))
    logged = lines(tmp_path / "run/01-online")
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert "rewards/accuracies" in logged[0]
    assert result["online"].policy is not None


def test_a_reward_stage_judges(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    first = stage("rm", data["pairs"], Reward(), max_steps=2)
    run(tiny_model_path, tmp_path / "run", first, online(data, "stage:rm", max_steps=2))
    assert "rewards/rm/mean" in lines(tmp_path / "run/02-online")[0]


def test_a_killed_stage_ends_in_the_same_bits(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"rollout_samples": 8, "epochs_per_batch": 2}
    run(tiny_model_path, tmp_path / "whole", online(data, **given))
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises((CrashError, StageError)):
            run(tiny_model_path, tmp_path / "again", online(data, **given))
    run(tiny_model_path, tmp_path / "again", online(data, **given))
    assert same(tmp_path / "whole/01-online/policy", tmp_path / "again/01-online/policy")


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"batch_size": 3}, "batch_size", "cut a pair"),
        ({"reference": {"mode": "none"}}, "reference.mode", "compares with a reference"),
        ({"trl": {"loss_type": "grpo", "beta": 0.3}}, "trl.beta", "belongs to"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingStage(name="s", training_data="x.jsonl", method={"type": "online_dpo", "reward": "m:f"}, **given)
    found = [(problem.path, problem.message) for problem in caught.value.problems]
    assert any(where == path and message in text for where, text in found), found


def test_the_flat_names_cannot_say_it() -> None:
    own = TrainingStage(name="s", training_data="x.jsonl", method={"type": "online_dpo", "reward": "m:f"})
    with pytest.raises(ConfigError, match=r"stages\.s\.method\.type: 'online_dpo' has no flat name"):
        own.to_flat(only_set=True)
