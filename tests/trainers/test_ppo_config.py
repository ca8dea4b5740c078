"""The arguments of PPO: sizes that divide, what GRPO has and PPO does not, defaults."""

from pathlib import Path
from typing import Any

import pytest

from stagekit.errors import ConfigError
from stagekit.trainers.ppo import PPOConfig
from tests.trainers.rl import arguments


def config(folder: Path, **options: Any) -> PPOConfig:
    return PPOConfig(**arguments(folder, **options))


def test_a_rollout_is_cut_into_minibatches_and_passed_over(tmp_path: Path) -> None:
    made = config(tmp_path, generation_batch_size=32, gradient_accumulation_steps=2, num_iterations=3)
    assert (made.steps_per_generation, made.steps_per_rollout) == (8, 12)
    assert made.num_generations == 1


def test_minibatches_decide_the_accumulation(tmp_path: Path) -> None:
    made = config(tmp_path, generation_batch_size=32, num_minibatches=2)
    assert (made.gradient_accumulation_steps, made.steps_per_rollout) == (4, 8)


def test_a_rollout_can_be_given_as_micro_batches(tmp_path: Path) -> None:
    made = config(tmp_path, generation_batch_size=None, steps_per_generation=3)
    assert made.generation_batch_size == 12


@pytest.mark.parametrize(
    ("prompts", "options", "expected"),
    [
        (5000, {}, 2048),
        (100, {}, 100),
        (99, {}, 96),
        (99, {"gradient_accumulation_steps": 8}, 96),
        (99, {"num_minibatches": 5}, 80),
        (3, {}, 4),  # one unit; that the data are too few is told when training starts
        (10, {"num_generations": 6}, 60),
    ],
)
def test_a_rollout_that_is_not_given_is_the_largest_that_the_data_allow(
    prompts: int, options: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    assert config(tmp_path, generation_batch_size=None, **options).rollout_for(prompts) == expected


def test_an_odd_rollout_of_single_completions_is_one(tmp_path: Path) -> None:
    made = config(tmp_path, per_device_train_batch_size=1, generation_batch_size=3)
    assert (made.steps_per_generation, made.num_generations) == (3, 1)


def test_defaults_are_those_of_the_papers(tmp_path: Path) -> None:
    made = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (made.epsilon, made.num_iterations, made.gae_lambda, made.gamma) == (0.2, 4, 0.95, 1.0)
    assert (made.vf_coef, made.entropy_coef, made.beta, made.adam_epsilon) == (0.5, 0.01, 0.01, 1e-5)
    assert made.disable_dropout
    assert made.loss_type == "dapo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_batch_size": 10}, "10 completions is no multiple of 4"),
        ({"generation_batch_size": 12, "gradient_accumulation_steps": 2}, "no multiple of 8"),
        ({"generation_batch_size": 12, "num_minibatches": 2}, "no multiple of 8 .*num_minibatches"),
        ({"num_minibatches": 2, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps says the same"),
        ({"steps_per_generation": 2}, "both say how large"),
        ({"loss_type": "grpo"}, "loss_type: 'grpo' has no effect in PPO"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"scale_rewards": "batch"}, "whiten_rewards"),
        ({"top_p": 0.9}, "top_p: 0.9 samples from another distribution"),
        ({"top_k": 5}, "top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"generation_kwargs": {"min_new_tokens": 3}}, "generation_kwargs.min_new_tokens"),
        ({"gae_lambda": 1.5}, "gae_lambda: 1.5 is not between"),
        ({"gamma": -0.1}, "gamma"),
        ({"vf_coef": -1.0}, "vf_coef"),
        ({"value_clip_range": 0.0}, "None leaves it out"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"logit_chunk_size": 0}, "logit_chunk_size: 0 is not at least 1"),
        ({"critic": "shared"}, "'shared' is none of auto, separate, head"),
        ({"kl_estimator": "k4"}, "'k4' is none of"),
        ({"target_kl": 0.1, "fp16": True}, "use bf16"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **options)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, top_p=0.9, gamma=2.0, loss_type="bnpo")
    assert {problem.path for problem in caught.value.problems} == {"top_p", "gamma", "loss_type"}
