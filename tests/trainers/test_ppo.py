"""PPO's trainer: what it learns from and how it steps. Each test pins a detail that PPO trainers get wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl.trainer.callbacks import TrainerCallback

from stagekit.errors import ConfigError, StageError
from stagekit.trainers.ppo_losses import last_token
from stagekit.trainers.ppo_metrics import Watch as Warnings
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


def test_a_run_logs_what_ppo_is_watched_by(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, max_steps=9)
    trainer.train()
    logged = {key for line in trainer.state.log_history for key in line}
    assert logged >= {
        "objective/score", "objective/kl", "objective/kl_per_token", "objective/rlhf_reward", "objective/no_eos_frac",
        "policy/approx_kl", "policy/ratio_max_dev", "policy_loss", "value/loss", "value/mean", "value/return_mean",
        "value/explained_variance", "value/clip_frac", "value/grad_norm", "entropy",
    }  # fmt: skip
    assert "frac_reward_zero_std" not in logged
    kl, kl_per_token = log_of(trainer, "objective/kl"), log_of(trainer, "objective/kl_per_token")
    assert kl[0] == kl_per_token[0] == 0  # policy == reference
    assert kl[1] > 0
    deviations = log_of(trainer, "policy/ratio_max_dev")
    assert deviations[0] < 1e-4 < deviations[1]  # a rollout is used for 2 * 4 steps
    assert deviations[8] < 1e-4


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


def norm(model: Any) -> float:
    return math.sqrt(sum(float(one.grad.square().sum()) for one in model.parameters() if one.grad is not None))


class Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at both models right before each optimiser step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.norms: list[tuple[float, float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.norms.append((norm(self.trainer.model), norm(self.trainer.critic)))
        own = self.trainer.critic.named_parameters()
        self.gradients.append({name: weight.grad.clone() for name, weight in own if weight.grad is not None})


def watched(folder: Path, path: str, **options: Any) -> tuple[Any, Watch]:
    watch = Watch()
    trainer = ppo(folder, path, callbacks=[watch], **options)
    watch.trainer = trainer
    return trainer, watch


def test_the_gradients_of_both_models_are_clipped(tiny_model_path: str, tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, tiny_model_path, max_grad_norm=0.05, max_steps=3)
    trainer.train()
    assert max(log_of(trainer, "grad_norm")) > 0.05  # logged as it was before
    assert max(log_of(trainer, "value/grad_norm")) > 0.05
    for norms in watch.norms:
        assert max(norms) <= 0.05 * 1.001


def test_the_value_models_gradients_are_of_one_step_only(tiny_model_path: str, tmp_path: Path) -> None:
    """With a learning rate of 0 each pass over a rollout has the same gradients, unless they pile up."""
    given = {"learning_rate": 0.0, "generation_batch_size": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trainer, watch = watched(tmp_path, tiny_model_path, max_steps=3, reshuffle=False, **given)
    trainer.train()
    first, second, third = watch.gradients
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(third[name], first[name], rtol=1e-4, atol=1e-6)


def test_gradients_depend_on_the_minibatch_and_not_on_its_parts(tiny_model_path: str, tmp_path: Path) -> None:
    norms = []
    for size, parts in ((8, 1), (4, 2), (2, 4)):
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        trainer = ppo(tmp_path, tiny_model_path, **FREE, **given)
        trainer.train()
        norms.append((log_of(trainer, "grad_norm")[0], log_of(trainer, "value/grad_norm")[0]))
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-3)


def test_each_completion_is_seen_once_in_each_pass_and_each_minibatch_is_a_step(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"generation_batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = ppo(tmp_path, tiny_model_path, num_iterations=3, max_steps=12, **given)
    seen: list[tuple[int, list[Any]]] = []
    compute = trainer._compute_loss

    def listen(model: Any, inputs: dict[str, Any]) -> Any:
        seen.append((trainer.state.global_step, inputs["old_per_token_logps"].sum(1).tolist()))
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", listen)
    trainer.train()
    assert trainer.args.steps_per_rollout == 6
    assert trainer.state.global_step == 12
    assert [step for step, _ in seen] == [step for step in range(12) for _ in range(2)]
    passes = [[row for _, rows in seen[start : start + 4] for row in rows] for start in range(0, 24, 4)]
    for own in (passes[:3], passes[3:]):
        assert sorted(own[0]) == sorted(own[1]) == sorted(own[2])
        assert own[0] != own[1] != own[2]  # in other minibatches
        assert len(set(own[0])) == 8
    assert set(passes[0]) != set(passes[3])


def test_nothing_is_dropped_out(tiny_model_path: str, tmp_path: Path) -> None:
    model = load(tiny_model_path)
    model.add_module("extra", torch.nn.Dropout(0.5))
    trainer = ppo(tmp_path, model, **_tok(tiny_model_path))
    for one in (trainer.model, trainer.ref_model, trainer.critic):
        assert all(module.p == 0 for module in one.modules() if isinstance(module, torch.nn.Dropout))


def test_the_optimiser_holds_both_models_and_anneals_with_its_steps(tiny_model_path: str, tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "linear", "critic_learning_rate": 5e-3, "weight_decay": 0.1, "max_steps": 4}
    trainer = ppo(tmp_path, tiny_model_path, **given)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert {group["eps"] for group in groups} == {1e-5}
    assert [group["initial_lr"] for group in groups] == [1e-3, 1e-3, 5e-3, 5e-3]
    held = sum(weight.numel() for group in groups for weight in group["params"])
    assert held == sum(weight.numel() for one in (trainer.model, trainer.critic) for weight in one.parameters())
    assert {id(w) for w in groups[3]["params"]} >= {id(trainer.critic.score.bias)}
    assert groups[3]["weight_decay"] == 0
    assert log_of(trainer, "learning_rate") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_the_same_seed_is_the_same_run(critic: str, tiny_model_path: str, tmp_path: Path) -> None:
    runs = []
    for seed in (1, 1, 2):
        trainer = ppo(tmp_path, tiny_model_path, critic=critic, seed=seed, num_iterations=2, max_steps=8)
        trainer.train()
        runs.append((bits(trainer.model), bits(trainer.critic)))
    assert equal(runs[0][0], runs[1][0])
    assert equal(runs[0][1], runs[1][1])
    assert not equal(runs[0][0], runs[2][0])


def test_a_rollout_is_left_when_the_policy_has_moved_too_far(tiny_model_path: str, tmp_path: Path) -> None:
    given = {"target_kl": 1e-3, "learning_rate": 1e-2, "max_steps": 16, "reshuffle": False}
    trainer, watch = watched(tmp_path, tiny_model_path, **given)
    trainer.train()
    skipped = log_of(trainer, "policy/skipped_frac")
    assert skipped[:2] == [0.0, 0.0]  # the first step moves nothing, the second finds out
    assert skipped[2:8] == [1.0] * 6
    assert skipped[8] == 0.0
    assert watch.norms[2:8] == [(0.0, 0.0)] * 6
    assert log_of(trainer, "value/grad_norm")[2] == 0


def test_a_skipped_step_leaves_every_weight_as_it_was(tiny_model_path: str, tmp_path: Path) -> None:
    given = {"target_kl": 1e-3, "learning_rate": 1e-2, "weight_decay": 0.5, "reshuffle": False}
    weights = []
    for steps in (2, 7):
        trainer = ppo(tmp_path, tiny_model_path, max_steps=steps, **given)
        trainer.train()
        weights.append((bits(trainer.model), bits(trainer.critic)))
    assert equal(weights[0][0], weights[1][0])
    assert equal(weights[0][1], weights[1][1])


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


def test_generation_in_parts_samples_every_prompt(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = ppo(tmp_path, tiny_model_path, rollout_chunk_size=3)
    sizes: list[int] = []
    generate = trainer.model.generate

    def listen(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(trainer.model, "generate", listen)
    batch = rollout(trainer)
    assert sizes == [3, 3, 2]
    texts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    assert [text.split("say ")[1] for text in texts] == [f"{row}:" for row in range(8)]
    assert batch["completion_mask"].sum(1).min() >= 1


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


def test_numbers_that_show_that_nothing_is_learned_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Warnings()
    for number in range(30):
        watch.look({"objective/kl": -1.0 if number > 3 else 0.0, "objective/score": 0.0})
        watch.look({"value/explained_variance": -2.0 if number < 20 else 0.5})
        watch.look({"value/clip_frac": 0.9 if number % 2 else 0.0})  # never in a row
    told = [record.getMessage().split(" = ")[0] for record in caplog.records]
    assert told == ["objective/kl", "value/explained_variance"]


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "head"])
def test_the_score_rises(critic: str, tiny_model_path: str, tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 16, "generation_batch_size": 64, "max_completion_length": 12}
    trainer = ppo(tmp_path, tiny_model_path, rows=64, critic=critic, max_steps=12 * 16, **given)
    trainer.train()
    scores = log_of(trainer, "objective/score")
    assert len(scores) == 12
    assert sum(scores[-3:]) / 3 > 2 * sum(scores[:3]) / 3
