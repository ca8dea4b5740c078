"""What `PPOTrainer` and `Rollouts` rest on in TRL and transformers without a promise from them: one place to look at
when a new version breaks PPO."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from tests.trainers.rl import arguments, letters, load, log_of, ppo, prompts, rollout


HOOKS = {
    "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields"],
    "_compute_loss": ["model", "inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_get_train_sampler": ["dataset"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "create_optimizer": ["model"],
    "_clip_grad_norm": ["model"],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_methods_that_are_extended_are_there(name: str) -> None:
    parameters = [key for key in inspect.signature(getattr(GRPOTrainer, name)).parameters if key != "self"]
    assert parameters[: len(HOOKS[name])] == HOOKS[name]


@pytest.mark.parametrize("name", ["_generate_single_turn", "_get_train_sampler", "_save_checkpoint"])
def test_rloo_has_those_that_it_shares(name: str) -> None:
    parameters = [key for key in inspect.signature(getattr(RLOOTrainer, name)).parameters if key != "self"]
    assert parameters[: len(HOOKS[name])] == HOOKS[name]


@pytest.fixture
def trainer(tiny_model_path: str, tmp_path: Path) -> Any:
    """GRPO as TRL has it, with two passes over a rollout."""
    args = GRPOConfig(**arguments(tmp_path, num_generations=2, num_iterations=2, beta=0.1))
    made = GRPOTrainer(load(tiny_model_path), letters, args, prompts(16), processing_class=_tokenizer(tiny_model_path))
    made.current_gradient_accumulation_steps = 2
    return made


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_a_rollout_holds_what_ppo_reads(trainer: Any) -> None:
    batch = rollout(trainer)
    assert set(batch) >= {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
        "old_per_token_logps", "ref_per_token_logps",
    }  # fmt: skip
    assert batch["num_items_in_batch"].dim() == 0
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_an_advantage_for_every_token_is_accepted(trainer: Any) -> None:
    batch = rollout(trainer)
    batch["advantages"] = torch.linspace(-1, 2, 8)
    one_each = trainer._compute_loss(trainer.model, batch)
    per_token = batch["advantages"][:, None].expand(-1, batch["completion_ids"].size(1))
    assert torch.equal(one_each, trainer._compute_loss(trainer.model, {**batch, "advantages": per_token}))
    other = per_token * torch.tensor([1.0, 2.0]).repeat(per_token.size(1))[: per_token.size(1)]
    assert not torch.equal(one_each, trainer._compute_loss(trainer.model, {**batch, "advantages": other}))


def test_a_beta_of_0_takes_the_kl_out_of_the_loss(trainer: Any) -> None:
    batch = rollout(trainer)
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"] - 1.0
    with_kl = trainer._compute_loss(trainer.model, batch)
    trainer.beta = 0.0
    assert not torch.equal(with_kl, trainer._compute_loss(trainer.model, batch))


def test_the_loss_is_normalised_as_the_value_loss_is(trainer: Any) -> None:
    batch = rollout(trainer)
    trainer.beta = 0.0
    batch["advantages"] = torch.ones(8)
    loss = trainer._compute_loss(trainer.model, batch)  # ratio 1, so -1 for each token
    trainer.current_gradient_accumulation_steps = 1
    assert float(loss.detach()) == pytest.approx(-1)
    assert float(trainer._compute_loss(trainer.model, batch).detach()) == pytest.approx(-2)


def test_a_rollout_is_kept_where_it_is_taken_from(trainer: Any) -> None:
    assert (trainer._step, trainer._buffered_inputs) == (0, None)
    trainer.train()
    assert trainer._step == 4
    assert len(trainer._buffered_inputs) == 2


def test_without_a_second_step_trl_leaves_the_old_log_probs_out_and_ppo_does_not(
    tiny_model_path: str, tmp_path: Path
) -> None:
    given = {"generation_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    plain = GRPOTrainer(
        load(tiny_model_path), letters, GRPOConfig(**arguments(tmp_path, num_generations=2, **given)), prompts(16),
        processing_class=_tokenizer(tiny_model_path),
    )  # fmt: skip
    assert "old_per_token_logps" not in rollout(plain)
    for critic in ("separate", "head"):
        trainer = ppo(tmp_path, tiny_model_path, num_iterations=1, critic=critic, **given)
        assert "old_per_token_logps" in rollout(trainer)
        trainer.train()
        assert log_of(trainer, "policy/ratio_max_dev")[0] < 1e-4


def test_each_process_samples_with_a_seed_of_its_own() -> None:
    """Else two processes would sample the same completions of the same prompts."""
    assert "set_seed(args.seed, device_specific=True)" in inspect.getsource(GRPOTrainer.__init__)


def test_transformers_empties_the_gradients_of_the_model_alone() -> None:
    text = inspect.getsource(Trainer._run_epoch)
    assert "model.zero_grad()" in text
    assert "optimizer.zero_grad()" not in text


def test_a_checkpoint_is_loaded_before_the_prompts_are_put_in_order() -> None:
    text = inspect.getsource(Trainer.train)
    assert text.index("self._load_from_checkpoint(") < text.index("inner_training_loop(")
    assert "get_train_dataloader()" in inspect.getsource(Trainer._inner_training_loop)
