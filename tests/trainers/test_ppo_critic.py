"""PPO's value models: where they start, what they are saved as."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stagekit.errors import ConfigError, StageError
from stagekit.trainers.ppo_critic import load_critic, new_head, save_critic, separate_critic
from tests.trainers.rl import bits, equal, letters, load, perturbed, ppo, rollout


def reward_model(path: str, folder: Path) -> Path:
    """A reward model of the tiny architecture, with weights of its own."""
    torch.manual_seed(3)
    model = perturbed(AutoModelForSequenceClassification.from_pretrained(path, num_labels=1), 5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


def make(source: Any, seed: int = 0) -> Any:
    return separate_critic(source, dtype=torch.float32, seed=seed)


def test_a_value_model_starts_from_the_reward_model_and_its_head(tiny_model_path: str, tmp_path: Path) -> None:
    folder = reward_model(tiny_model_path, tmp_path / "rm")
    reward = AutoModelForSequenceClassification.from_pretrained(folder)
    critic = make(folder)
    assert equal(bits(critic.backbone), bits(reward.base_model))
    assert torch.equal(critic.score.weight, reward.score.weight)
    assert not critic.score.bias.any()
    assert all(weight.requires_grad for weight in critic.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    scores = reward(ids, attention_mask=mask).logits[0, 0]
    after_one_more = critic(torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5, dtype=torch.long), 1)
    torch.testing.assert_close(after_one_more[0, 0], scores)


def test_the_adapter_of_a_reward_model_is_merged(tiny_model_path: str, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = get_peft_model(base, config)
    perturbed(adapted, 4)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "adapter")
    critic = make(tmp_path / "adapter")
    plain = load(tiny_model_path).base_model
    name = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(critic.backbone.get_parameter(name), plain.get_parameter(name))
    assert "lora" not in " ".join(dict(critic.named_parameters()))


def test_a_value_model_from_a_language_model_has_a_new_head(tiny_model_path: str) -> None:
    critic = make(tiny_model_path)
    assert equal(bits(critic.backbone), bits(load(tiny_model_path).base_model))
    assert torch.equal(critic.score.weight, new_head(critic.score.in_features, 0).weight)
    assert not torch.equal(critic.score.weight, make(tiny_model_path, seed=1).score.weight)


def test_a_new_head_has_the_deviation_of_the_paper() -> None:
    head = new_head(4095, 7)
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(4096), rel=0.05)
    assert not head.bias.any()


def test_a_new_head_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    new_head(64, 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_saved_is_loaded(tiny_model_path: str, tmp_path: Path) -> None:
    critic = perturbed(make(tiny_model_path))
    save_critic(critic, tmp_path)
    again = make(tiny_model_path)
    assert not equal(bits(again), bits(critic))
    load_critic(again, tmp_path)
    assert equal(bits(again), bits(critic))


def test_a_checkpoint_without_a_value_model_is_refused(tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has no value_model/"):
        load_critic(make(tiny_model_path), tmp_path)


def test_a_name_that_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="nowhere could not be loaded as a value model"):
        make(tmp_path / "nowhere")


def test_the_trainer_starts_its_value_model_from_a_reward_model(tiny_model_path: str, tmp_path: Path) -> None:
    folder = reward_model(tiny_model_path, tmp_path / "rm")
    trainer = ppo(tmp_path, tiny_model_path, critic_model=folder, reward=str(folder), max_steps=2)
    reward = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(trainer.critic.score.weight, reward.score.weight)
    batch = rollout(trainer)
    texts = [
        trainer.processing_class.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert len(texts) == 8
    trainer.train()
    assert "rewards/rm/mean" in {key for line in trainer.state.log_history for key in line}


def test_a_head_starts_from_no_model(tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use critic='separate'"):
        ppo(tmp_path, tiny_model_path, critic="head", critic_model=tiny_model_path, reward=letters)
