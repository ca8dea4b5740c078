"""PPO stages through pipelines on the tiny model: rewards by every name, references, resume, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagekit import ConfigError, StageError, TrainingStage
from stagekit.adapters import PPO, ProcessReward, Reward
from stagekit.groups import Generation, LoRA, Reference, RewardSource
from stagekit.plan import plan
from tests.running import CrashError, crash_at, lines, pipeline, run, same, stage, weights
from tests.test_reward_models import pairs


Write = Callable[..., Path]
HERE = "tests.adapters.test_ppo"
SHORT = Generation(max_new_tokens=6)


def vowels(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """How many vowels an answer has, a quarter each."""
    return [sum(letter in "aeiou" for letter in turns[0]["content"]) / 4 for turns in completions]


def constant(prompts: Any, completions: Any, factor: float, **columns: Any) -> list[float]:
    return [factor] * len(prompts)


def broken(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float("nan") if "fruit" in prompt[0]["content"] else 1.0 for prompt in prompts]


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any]) -> dict[str, str]:
    steps = [
        {"prompt": row["prompt"], "completions": ["One.", "Two."], "labels": [True, number % 2 == 0]}
        for number, row in enumerate(sft_rows)
    ]
    return {
        "prompts": str(write_rows([{"prompt": row["prompt"], "number": 3} for row in sft_rows], "prompts.jsonl")),
        "pairs": str(write_rows(pairs(32, 0), "pairs.jsonl")),
        "steps": str(write_rows(steps, "steps.jsonl")),
        "sft": str(write_rows(sft_rows, "sft.jsonl")),
    }


def ppo(data: dict[str, str], reward: Any = vowels, **options: Any) -> TrainingStage:
    own = {key: options.pop(key) for key in list(options) if key in PPO.model_fields}
    method = PPO(reward=reward, **{"rollout_samples": 8, **own})
    given = {"generation": SHORT, "checkpoint_save_steps": 5, "max_steps": 12, **options}
    return stage("ppo", data["prompts"], method, **given)


def test_a_stage_learns_from_a_function_and_leaves_a_policy(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path / "run", ppo(data, f"{HERE}:vowels"))
    assert result["ppo"].artifacts == {"policy": "01-ppo/policy"}
    assert not (tmp_path / "run/01-ppo/policy/value_model").exists()
    logged = lines(tmp_path / "run/01-ppo")
    assert logged[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert any(line.get("objective/score", 0) > 0 for line in logged)
    assert "rewards/vowels/mean" in logged[0]
    assert not same(tiny_model_path, tmp_path / "run/01-ppo/policy")


@pytest.mark.parametrize("step", [7, 11], ids=["inside a rollout", "inside the next"])
def test_a_killed_stage_ends_in_the_same_bits(
    step: int, data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model_path, tmp_path / "whole", ppo(data))
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises((CrashError, StageError)):
            run(tiny_model_path, tmp_path / "again", ppo(data))
    run(tiny_model_path, tmp_path / "again", ppo(data))
    assert same(tmp_path / "whole/01-ppo/policy", tmp_path / "again/01-ppo/policy")
    assert lines(tmp_path / "whole/01-ppo") == lines(tmp_path / "again/01-ppo")
    assert whole["ppo"].steps == 12


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_a_reward_stage_scores_and_its_weights_start_the_value_model(
    lora: LoRA | None, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    first = stage("rm", data["pairs"], Reward(), max_steps=3, lora=lora)
    second = ppo(data, "stage:rm", max_steps=3, checkpoint_save_steps=1, learning_rate=1e-9)
    result = run(tiny_model_path, tmp_path / "run", first, second)
    assert "rewards/rm/mean" in lines(tmp_path / "run/02-ppo")[0]
    critic = load_file(tmp_path / "run/02-ppo/checkpoints/checkpoint-1/value_model/model.safetensors")
    folder = Path(str(result["rm"].reward_model))
    names = {"score.weight", "base_model.model.score.weight"}
    head = next(weight for name, weight in weights(folder).items() if name in names)
    torch.testing.assert_close(critic["score.weight"], head, rtol=0, atol=1e-6)


def test_a_process_reward_stage_scores_the_weakest_step(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    first = stage("prm", data["steps"], ProcessReward(), max_steps=2)
    run(tiny_model_path, tmp_path / "run", first, ppo(data, "stage:prm", max_steps=2))
    scores = [line["objective/score"] for line in lines(tmp_path / "run/02-ppo") if "objective/score" in line]
    assert scores
    assert all(0 <= score <= 1 for score in scores)


def test_rewards_are_weighted_and_take_options(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    rewards = [
        {"source": f"{HERE}:constant", "weight": 0.5, "options": {"factor": 4.0}},
        RewardSource(constant, name="second", weight=2.0, options={"factor": 10.0}),
    ]
    run(tiny_model_path, tmp_path / "run", ppo(data, rewards, max_steps=1))
    logged = lines(tmp_path / "run/01-ppo")[0]
    assert (logged["rewards/constant/mean"], logged["rewards/second/mean"]) == (4.0, 10.0)
    assert logged["objective/score"] == 22.0


def test_a_reward_that_is_no_number_fails_the_stage_with_the_prompt_and_the_completion(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(
        StageError, match=r"stage 'ppo': reward 'broken' gave nan(?s:.*)user: Name a fruit(?s:.*)completion"
    ):
        run(tiny_model_path, tmp_path / "run", ppo(data, broken, max_steps=24))


def test_an_adapter_is_trained_with_a_head_and_goes_on_against_its_own_copy(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    adapter = LoRA(rank=4)
    first = stage("sft", data["sft"], max_steps=2, lora=adapter)
    second = ppo(data, lora=adapter, max_steps=9, reference=Reference(update_every=8), checkpoint_save_steps=0)
    run(tiny_model_path, tmp_path / "run", first, second)
    logged = lines(tmp_path / "run/02-ppo")
    kl = [line["objective/kl"] for line in logged if "objective/kl" in line]
    assert kl == pytest.approx([0, 0], abs=1e-5)  # against the adapter that came in, then against that of step 8
    assert logged[0]["policy/ratio_max_dev"] < 1e-4  # no dropout
    assert (tmp_path / "run/02-ppo/policy/adapter_config.json").is_file()


def test_a_reference_that_follows_survives_a_kill(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"reference": Reference(update_every=4)}
    run(tiny_model_path, tmp_path / "whole", ppo(data, **given))
    with monkeypatch.context() as patch:
        crash_at(patch, 6)
        with pytest.raises((CrashError, StageError)):
            run(tiny_model_path, tmp_path / "again", ppo(data, **given))
    run(tiny_model_path, tmp_path / "again", ppo(data, **given))
    assert same(tmp_path / "whole/01-ppo/policy", tmp_path / "again/01-ppo/policy")


def test_without_a_rollout_the_data_decide(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    own = stage("ppo", data["prompts"], PPO(reward=vowels), generation=SHORT, max_steps=0, epochs=1, batch_size=4)
    result = run(tiny_model_path, tmp_path / "run", own)
    assert result["ppo"].steps == 16  # one rollout of 16 completions, 4 minibatches, 4 passes
    assert plan(pipeline(tiny_model_path, tmp_path / "plan", own))[0]["steps"] == 16


def test_too_large_a_rollout_is_an_error(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs 32 prompts, but the data have 16"):
        run(tiny_model_path, tmp_path / "run", ppo(data, rollout_samples=32))


def test_an_evaluation_measures_the_reward(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    method = PPO(reward=vowels)
    only = TrainingStage(
        name="measure", method=method, validation_data=data["prompts"], is_evaluation_only=True, batch_size=4,
        generation=SHORT,
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path / "run", only)
    logged = lines(tmp_path / "run/01-measure")
    assert "eval_reward" in logged[-1]
    assert result["measure"].metrics["eval_reward"] == logged[-1]["eval_reward"]


def told(**given: Any) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        TrainingStage(name="s", training_data="rows.jsonl", **given)
    return [(problem.path, problem.message) for problem in caught.value.problems]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"method": "ppo"}, "method.reward", "missing; say what scores"),
    ({"method": {"type": "ppo", "reward": []}}, "method.reward", "an empty list"),
    ({"method": {"type": "ppo", "reward": "no module:f"}}, "method.reward", "a function is named as"),
    ({"method": {"type": "ppo", "reward": {"source": "rm", "options": {"a": 1}}}}, "method.reward.options",
     "are arguments of a function"),
    ({"method": {"type": "ppo", "reward": ["rm", {"source": "a.b:c", "wieght": 2}]}}, "method.reward.1.wieght",
     "did you mean 'weight'"),
    ({"method": {"type": "ppo", "reward": "rm", "rollout_samples": 12}, "batch_size": 8}, "method.rollout_samples",
     "no whole minibatches of 8"),
    ({"method": {"type": "ppo", "reward": "rm"}, "trl": {"num_iterations": 2}}, "trl.num_iterations",
     "belongs to method.epochs_per_batch"),
    ({"method": {"type": "ppo", "reward": "rm"}, "trl": {"num_minibatches": 2}}, "trl.num_minibatches",
     "belongs to gradient_accumulation_steps"),
    ({"method": {"type": "ppo", "reward": "rm"}, "generation": {"top_p": 0.9}}, "generation.top_p",
     "another distribution"),
    ({"method": {"type": "ppo", "reward": "rm"}, "generation": {"temperature": 0}}, "generation.temperature",
     "explores nothing"),
    ({"method": {"type": "ppo", "reward": "rm"}, "generation": {"batch_tokens": 5}}, "generation.batch_tokens",
     "samples with TRL"),
    ({"method": {"type": "ppo", "reward": "rm"}, "reference": {"mode": "precompute"}}, "reference.mode",
     "sampled anew"),
    ({"method": {"type": "ppo", "reward": "rm"}, "reference": {"mode": "base"}}, "reference.mode", "needs lora"),
    ({"method": {"type": "ppo", "reward": "rm", "kl_penalty_coefficient": 0.1}, "reference": {"mode": "none"}},
     "method.kl_penalty_coefficient", "has no effect with reference.mode: none"),
    ({"method": {"type": "ppo", "reward": "rm", "kl_penalty_coefficient": 0.0}, "reference": {"update_every": 3}},
     "reference.update_every", "without a reference"),
    ({"method": {"type": "ppo", "reward": "rm", "kl_penalty_coefficient": 0.0, "kl_estimator": "k3"}},
     "method.kl_estimator", "has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "path", "message"), REFUSED, ids=[path + str(n) for n, (_, path, _) in enumerate(REFUSED)]
)
def test_what_cannot_be_is_refused_with_its_path(given: dict[str, Any], path: str, message: str) -> None:
    assert any(where == path and message in text for where, text in told(**given)), told(**given)


def test_a_reward_names_an_earlier_stage_that_leaves_a_reward_model(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    sft = stage("sft", data["sft"])
    for name, message in (("sft", "stage 'sft' leaves no reward model"), ("rm", "no stage 'rm' before this one")):
        with pytest.raises(ConfigError, match=f"stages.ppo.method.reward: {message}"):
            pipeline(tiny_model_path, tmp_path, sft, ppo(data, f"stage:{name}"))


def test_a_function_that_is_not_there_is_found_before_a_run(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    wanted = pipeline(tiny_model_path, tmp_path, ppo(data, f"{HERE}:vowel"))
    with pytest.raises(ConfigError, match=r"method\.reward: .*has no 'vowel'; did you mean 'vowels'"):
        wanted.run(quiet=True)


def test_the_flat_spelling_is_the_same_stage() -> None:
    flat = TrainingStage(
        name="s", training_data="rows.jsonl", stage_type="proximal_policy_optimization", reward_model="stage:rm",
        kl_penalty_coefficient=0.05, ppo_clip_range=0.1, value_function_coefficient=0.4, entropy_coefficient=0.0,
        gae_lambda=0.9, ppo_epochs_per_batch=2, rollout_samples=64,
    )  # fmt: skip
    slots = PPO(
        reward="stage:rm", kl_penalty_coefficient=0.05, clip_range=0.1, value_coefficient=0.4,
        entropy_coefficient=0.0, gae_lambda=0.9, epochs_per_batch=2, rollout_samples=64,
    )  # fmt: skip
    assert flat == TrainingStage(name="s", training_data="rows.jsonl", method=slots)
    assert TrainingStage(**flat.to_flat(only_set=True)) == flat


def test_the_arguments_say_where_they_come_from(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    entry = plan(pipeline(tiny_model_path, tmp_path, ppo(data, clip_range=0.3)))[0]
    found = {one["argument"]: (one["value"], one["source"]) for one in entry["arguments"]}
    assert found["epsilon"] == (0.3, "stages.ppo.method.clip_range")
    assert found["num_iterations"] == (4, "default of ppo")
    assert found["adam_epsilon"][0] == 1e-5
    assert found["max_completion_length"] == (6, "stages.ppo.generation.max_new_tokens")
    assert found["disable_dropout"][0] is True
    assert any("frozen copy" in note for note in entry["notes"])


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_bfloat16_and_activation_checkpointing_train_both_models(
    critic: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    given = {"use_mixed_precision": True, "mixed_precision_dtype": "bf16", "use_gradient_checkpointing": True}
    run(tiny_model_path, tmp_path / "run", ppo(data, critic=critic, max_steps=9, checkpoint_save_steps=8, **given))
    logged = lines(tmp_path / "run/01-ppo")
    assert abs(logged[0]["objective/kl"]) < 0.05
    assert logged[0]["policy/ratio_max_dev"] < 0.05
    assert all(line["value/grad_norm"] > 0 for line in logged if "value/grad_norm" in line)
    saved = load_file(tmp_path / "run/01-ppo/checkpoints/checkpoint-8/value_model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_frozen_layers_of_the_policy_stay_and_the_value_model_learns(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    given = {"frozen_layers": ["layers.0"], "max_steps": 3}
    run(tiny_model_path, tmp_path / "run", ppo(data, critic="head", **given))
    before, after = weights(tiny_model_path), weights(tmp_path / "run/01-ppo/policy")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("layers.0." in name for name in changed)
    assert all(line["value/grad_norm"] > 0 for line in lines(tmp_path / "run/01-ppo") if "value/grad_norm" in line)


def test_an_adapter_over_a_quantised_base_is_trained(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    run(tiny_model_path, tmp_path / "run", ppo(data, lora=LoRA(rank=4, bits=4), max_steps=9))
    logged = lines(tmp_path / "run/01-ppo")
    assert abs(logged[0]["objective/kl"]) < 0.05
    saved = weights(tmp_path / "run/01-ppo/policy")
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
