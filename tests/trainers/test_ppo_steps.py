"""How PPO's trainer steps: gradients of both models, minibatches, the optimiser, seeds, leaving a rollout early."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from trl.trainer.callbacks import TrainerCallback

from stagekit.trainers.ppo_metrics import Watch as Warnings
from tests.trainers.rl import bits, equal, load, log_of, ppo, rollout


FREE = {"entropy_coef": 0.0, "whiten_advantages": False, "reshuffle": False}


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
    trainer = ppo(tmp_path, model, processing_class=AutoTokenizer.from_pretrained(tiny_model_path))
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


def test_numbers_that_show_that_nothing_is_learned_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Warnings()
    for number in range(30):
        watch.look({"objective/kl": -1.0 if number > 3 else 0.0, "objective/score": 0.0})
        watch.look({"value/explained_variance": -2.0 if number < 20 else 0.5})
        watch.look({"value/clip_frac": 0.9 if number % 2 else 0.0})  # never in a row
    told = [record.getMessage().split(" = ")[0] for record in caplog.records]
    assert told == ["objective/kl", "value/explained_variance"]
