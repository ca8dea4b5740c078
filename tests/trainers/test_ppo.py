"""PPO's trainer: what it learns from and how it steps. Each test pins a detail that PPO trainers get wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from stagekit.errors import ConfigError, StageError
from stagekit.trainers.ppo_losses import last_token
from tests.trainers.rl import bits, equal, letters, load, log_of, perturbed, ppo, prompts, rollout


FREE = {"entropy_coef": 0.0, "whiten_advantages": False, "reshuffle": False}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def loss_of(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of a rollout as one micro-batch."""
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    loss: torch.Tensor = trainer._compute_loss(trainer.model, batch)
    return loss


def by_hand(model: Any, batch: dict[str, Any], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs (B, T) of the completions from the model's logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = type(model).forward(model, input_ids=ids, attention_mask=attention).logits[:, :-1] / temperature
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logps[:, -batch["completion_ids"].size(1) :] * batch["completion_mask"]


def test_scores_and_kl_make_the_rewards_and_the_advantages(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(
        tmp_path, perturbed(load(tiny_model_path)), beta=0.3, whiten_advantages=False, **_tok(tiny_model_path)
    )
    perturbed(trainer.model, 1)  # so that it is not its reference
    batch = rollout(trainer)
    mask = batch["completion_mask"].float()
    policy, reference = by_hand(trainer.model, batch), by_hand(trainer.ref_model, batch)
    torch.testing.assert_close(batch["old_per_token_logps"], policy, rtol=1e-5, atol=1e-5)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    scores = torch.tensor(letters(None, texts))
    assert scores.any()
    rewards = -0.3 * (policy - reference) * mask + scores[:, None] * last_token(mask)
    values, after = batch["values"] * mask, torch.zeros(len(scores))
    returns = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):  # lambda-returns, token by token
        later = values[:, t + 1] if t + 1 < values.size(1) else torch.zeros(len(scores))
        target = rewards[:, t] + 0.05 * later + 0.95 * after
        after = torch.where(mask[:, t] > 0, target, after)
        returns[:, t] = target * mask[:, t]
    torch.testing.assert_close(batch["returns"], returns, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch["advantages"], returns - values, rtol=1e-4, atol=1e-4)


def test_advantages_of_a_rollout_are_white_and_rewards_can_be(tiny_model_path: str, tmp_path: Path) -> None:
    batch = rollout(ppo(tmp_path, tiny_model_path))
    kept = batch["advantages"][batch["completion_mask"].bool()]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-5)
    assert float(kept.square().mean()) == pytest.approx(1, rel=1e-4)
    given = {"beta": 0.0, "gae_lambda": 1.0, "whiten_advantages": False}
    plain = rollout(ppo(tmp_path, tiny_model_path, **given))
    white = rollout(ppo(tmp_path, tiny_model_path, whiten_rewards=True, **given))
    mask = plain["completion_mask"]
    rewards = plain["returns"] * last_token(mask)
    scale = rewards[mask.bool()].std(unbiased=False)
    mean = rewards[mask.bool()].mean()
    expected = (((rewards - mean) / scale + mean) * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(white["returns"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_are_those_of_the_temperature_that_samples(
    temperature: float, tiny_model_path: str, tmp_path: Path
) -> None:
    trainer = ppo(tmp_path, tiny_model_path, temperature=temperature)
    batch = rollout(trainer)
    expected = by_hand(trainer.model, batch, temperature)
    torch.testing.assert_close(batch["old_per_token_logps"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_padding_changes_neither_log_probs_nor_values(critic: str, tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, critic=critic)
    batch = rollout(trainer)
    assert (batch["prompt_mask"] == 0).any()
    for row in range(len(batch["values"])):
        prompt, answer = batch["prompt_mask"][row].bool(), batch["completion_mask"][row].bool()
        alone = {
            "prompt_ids": batch["prompt_ids"][row][prompt][None],
            "prompt_mask": torch.ones(1, int(prompt.sum()), dtype=torch.long),
            "completion_ids": batch["completion_ids"][row][answer][None],
            "completion_mask": torch.ones(1, int(answer.sum()), dtype=torch.long),
        }
        scored = trainer._score_again(alone)
        values = scored.values if scored.values is not None else trainer._values_of(alone)
        torch.testing.assert_close(batch["old_per_token_logps"][row][answer][None], scored.logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch["values"][row][answer][None], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_a_value_is_of_the_state_before_the_token(critic: str, tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, critic=critic)
    batch = rollout(trainer)
    changed = {**batch, "completion_ids": batch["completion_ids"].clone()}
    changed["completion_ids"][:, 2] = (changed["completion_ids"][:, 2] + 1) % 50
    scored = trainer._score_again(changed)
    values = scored.values if scored.values is not None else trainer._values_of(changed)
    mask = batch["completion_mask"].bool()
    same = (values - batch["values"]).abs() < 1e-5
    assert same[:, :3].all()
    assert not same[:, 3][mask[:, 3]].any()


def test_eos_is_learned_where_it_is_the_padding_token(tiny_model_path: str, tmp_path: Path) -> None:
    given = _tok(tiny_model_path)
    tokenizer = given["processing_class"]
    tokenizer.pad_token = tokenizer.eos_token
    trainer = ppo(tmp_path, tiny_model_path, generation_batch_size=16, max_completion_length=24, **given)
    batch = rollout(trainer)
    mask = batch["completion_mask"]
    lengths = mask.sum(1)
    ends = (batch["completion_ids"] == tokenizer.eos_token_id) & (last_token(mask) > 0)
    assert ends.any(), "no completion ended; sample longer ones"
    assert (lengths < mask.size(1)).any()
    now = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], mask], 1),
        mask.size(1),
    )[0]
    now[ends].sum().backward()
    head = trainer.model.get_output_embeddings().weight.grad
    assert head[tokenizer.eos_token_id].abs().sum() > 0


def test_only_a_completion_that_does_not_end_is_punished_for_it(tiny_model_path: str, tmp_path: Path) -> None:
    data = prompts(32).map(lambda row: {"prompt": "<|im_end|>" + row["prompt"]})  # the EOS of a prompt ends nothing
    given = {"beta": 0.0, "gae_lambda": 1.0, "whiten_advantages": False, "max_completion_length": 24}
    given |= {"generation_batch_size": 16, "train_dataset": data}
    plain = rollout(ppo(tmp_path, tiny_model_path, **given))
    trainer = ppo(tmp_path, tiny_model_path, missing_eos_penalty=2.5, **given)
    punished = rollout(trainer)
    mask = plain["completion_mask"]
    last = (plain["completion_ids"] * last_token(mask)).sum(1)
    ended = torch.isin(last, torch.tensor(trainer.eos_token_ids))
    assert ended.any()
    assert not ended.all()
    difference = ((punished["returns"] - plain["returns"]) * last_token(mask)).sum(1)
    torch.testing.assert_close(difference, torch.where(ended, 0.0, -2.5))


def test_every_token_that_ends_a_completion_counts(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path)
    trainer.eos_token_ids = [7, 9]
    ids = torch.tensor([[5, 7, 0], [5, 9, 0], [5, 6, 8], [7, 5, 5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).float()
    assert trainer._ended(ids, mask).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["vf_coef", "entropy_coef"])
def test_the_loss_is_linear_in_its_coefficients(name: str, tiny_model_path: str, tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 1.0, 3.0):
        trainer = ppo(tmp_path, tiny_model_path, **{**FREE, "vf_coef": 0.0, name: weight})
        losses.append(float(loss_of(trainer, rollout(trainer)).detach()))
    assert losses[1] != losses[0]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)


def test_the_value_loss_is_half_the_mean_squared_error(tiny_model_path: str, tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 0.5):
        trainer = ppo(tmp_path, tiny_model_path, **FREE, vf_coef=weight, value_clip_range=None)
        batch = rollout(trainer)
        losses.append(float(loss_of(trainer, batch).detach()))
    errors = (batch["values"] - batch["returns"])[batch["completion_mask"].bool()]
    assert losses[1] - losses[0] == pytest.approx(0.25 * float(errors.square().mean()), rel=1e-4)
    trainer.current_gradient_accumulation_steps = 1  # the rollout is two minibatches, and each has the mean of its own
    assert float(trainer._compute_loss(trainer.model, batch).detach()) == pytest.approx(2 * losses[1], rel=1e-4)


def test_the_kl_is_in_the_reward_and_not_in_the_loss(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, beta=0.5)
    batch = rollout(trainer)
    with_kl = loss_of(trainer, {**batch, "ref_per_token_logps": batch["old_per_token_logps"] - 1.0})
    trainer.beta = trainer.args.beta = 0.0
    assert torch.equal(with_kl, loss_of(trainer, batch))


def test_without_a_kl_there_is_no_reference(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, beta=0.0, max_steps=2)
    assert trainer.ref_model is None
    trainer.train()
    assert log_of(trainer, "objective/kl") == [0.0]


def test_the_reference_has_the_weights_of_a_policy_given_as_an_object(tiny_model_path: str, tmp_path: Path) -> None:
    policy = perturbed(load(tiny_model_path))
    trainer = ppo(tmp_path, policy, max_steps=1, **_tok(tiny_model_path))
    assert equal(bits(trainer.ref_model), bits(policy))
    assert equal(bits(trainer.critic.backbone), bits(policy.base_model))
    trainer.train()
    assert log_of(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-5)


def test_the_reference_follows_every_n_steps(tiny_model_path: str, tmp_path: Path) -> None:
    given = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 3}
    trainer = ppo(tmp_path, tiny_model_path, max_steps=3, **given)
    before = bits(trainer.ref_model)
    trainer.train()
    assert equal(bits(trainer.ref_model), bits(trainer.model))
    assert not equal(bits(trainer.ref_model), before)


def test_data_that_do_not_fill_a_rollout_are_an_error(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, rows=5)
    with pytest.raises(ConfigError, match="needs 8 prompts, but the data have 5"):
        trainer.train()


def test_a_rollout_that_is_not_given_fits_the_data(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, rows=15, generation_batch_size=None, max_steps=1)
    assert trainer.args.generation_batch_size == 12
    trainer.train()
    assert trainer.state.global_step == 1


def test_several_completions_of_a_prompt_make_do_with_fewer_prompts(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, rows=2, num_generations=4, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("use", ["separate", "head"])
def test_an_adapter_is_trained_against_its_base(use: str, tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, peft_config=LORA, critic=use, max_steps=9)
    assert trainer.ref_model is None
    base = {name: weight for name, weight in bits(trainer.model).items() if "lora" not in name}
    head = trainer.critic.score.weight.clone()
    trainer.train()
    kl = log_of(trainer, "objective/kl")
    assert kl[0] == 0
    assert kl[1] != 0
    after = bits(trainer.model)
    assert equal(base, {name: weight for name, weight in after.items() if "lora" not in name})
    assert any(weight.any() for name, weight in after.items() if "lora_B" in name)
    assert not torch.equal(trainer.critic.score.weight, head)


def test_with_an_adapter_the_value_model_is_a_head(tiny_model_path: str, tmp_path: Path) -> None:
    assert ppo(tmp_path, tiny_model_path, peft_config=LORA).critic.needs_policy
    assert not ppo(tmp_path, tiny_model_path).critic.needs_policy


def test_the_policy_is_saved_alone(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "value_model").exists()
    assert equal(bits(load(str(tmp_path / "saved"))), bits(trainer.model))


def test_an_evaluation_scores_without_training(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, eval_dataset=prompts(6))
    before = bits(trainer.model)
    found = trainer.evaluate()
    assert found["eval_objective/score"] == found["eval_reward"]
    assert math.isfinite(found["eval_loss"])
    assert equal(bits(trainer.model), before)


def test_a_reward_that_is_no_number_stops_the_run_and_names_its_completion(
    tiny_model_path: str, tmp_path: Path
) -> None:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [math.nan if "say 3:" in prompt else 1.0 for prompt in prompts]

    with pytest.raises(StageError, match=r"reward 'reward' gave nan.*\n  prompt: Well, Well, Well, say 3:"):
        ppo(tmp_path, tiny_model_path, reward=reward, shuffle_dataset=False).train()


def test_a_completion_that_no_reward_scores_stops_the_run(tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no reward function scores a completion of this prompt: 'say 0:'"):
        ppo(
            tmp_path, tiny_model_path, reward=lambda prompts, **_: [None] * len(prompts), shuffle_dataset=False
        ).train()


def test_rewards_are_weighted_and_summed(tiny_model_path: str, tmp_path: Path) -> None:
    def one(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    def sometimes(completions: list[str], prompts: list[str], **columns: Any) -> list[float | None]:
        return [10.0 if "say 1:" in prompt else None for prompt in prompts]

    given = {"reward": [one, sometimes], "reward_weights": [0.5, 2.0], "gae_lambda": 1.0, "beta": 0.0}
    batch = rollout(ppo(tmp_path, tiny_model_path, whiten_advantages=False, **given))
    assert batch["returns"][:, 0].tolist() == pytest.approx([0.5, 20.5, *[0.5] * 6])


def _tok(path: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {"processing_class": AutoTokenizer.from_pretrained(path)}


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "head"])
def test_the_score_rises(critic: str, tiny_model_path: str, tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 16, "generation_batch_size": 64, "max_completion_length": 12}
    trainer = ppo(tmp_path, tiny_model_path, rows=64, critic=critic, max_steps=12 * 16, **given)
    trainer.train()
    scores = log_of(trainer, "objective/score")
    assert len(scores) == 12
    assert sum(scores[-3:]) / 3 > 2 * sum(scores[:3]) / 3
