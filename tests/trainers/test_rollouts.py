"""What the sampling trainers lack in TRL: exact resume, the right reference, positions that padding does not move."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from stagekit.errors import ConfigError, StageError
from stagekit.trainers.rollouts import ExactGRPOTrainer, ExactRLOOTrainer, count_positions_from_the_first_token
from tests.trainers.rl import arguments, bits, equal, letters, load, log_of, perturbed, ppo, prompts


GROUPS = {"num_generations": 2, "num_iterations": 2, "beta": 0.02}


def trl(kind: Any, config: Any, folder: Path, model: Any, path: str, **options: Any) -> Any:
    own = {key: options.pop(key) for key in ("chunk_size", "order_seed") if key in options}
    data = prompts(options.pop("rows", 8))
    args = config(**arguments(folder, **{**GROUPS, **options}))
    tokenizer = AutoTokenizer.from_pretrained(path)
    return kind(model=model, reward_funcs=letters, args=args, train_dataset=data, processing_class=tokenizer, **own)


def ppo_of(folder: Path, path: str, **options: Any) -> Any:
    return ppo(folder, path, rows=16, num_iterations=2, **options)


def head_of(folder: Path, path: str, **options: Any) -> Any:
    return ppo(folder, path, rows=16, num_iterations=2, critic="head", target_kl=1e-3, **options)


def grpo_of(folder: Path, path: str, **options: Any) -> Any:
    return trl(ExactGRPOTrainer, GRPOConfig, folder, path, path, **options)


def rloo_of(folder: Path, path: str, **options: Any) -> Any:
    return trl(ExactRLOOTrainer, RLOOConfig, folder, path, path, **options)


MAKERS: dict[str, Callable[..., Any]] = {"ppo": ppo_of, "ppo head": head_of, "grpo": grpo_of, "rloo": rloo_of}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("step", [4, 6, 13], ids=["between rollouts", "inside one", "in the second epoch of three"])
def test_a_killed_run_goes_on_with_the_same_bits(kind: str, step: int, tiny_model_path: str, tmp_path: Path) -> None:
    given = {"max_steps": 20, "save_strategy": "steps", "save_steps": step}
    whole = MAKERS[kind](tmp_path / "whole", tiny_model_path, **given)
    whole.train()
    again = MAKERS[kind](tmp_path / "again", tiny_model_path, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / f"checkpoint-{step}"))
    assert equal(bits(again.model), bits(whole.model))
    if hasattr(whole, "critic"):
        assert equal(bits(again.critic), bits(whole.critic))
    for key in ("reward", "grad_norm"):
        assert log_of(again, key) == log_of(whole, key)[-len(log_of(again, key)) :]


def test_the_order_of_prompts_is_that_of_trl(tiny_model_path: str, tmp_path: Path) -> None:
    ours, theirs = grpo_of(tmp_path, tiny_model_path), trl(GRPOTrainer, GRPOConfig, tmp_path, *[tiny_model_path] * 2)
    first, second = ours._get_train_sampler(), theirs._get_train_sampler()
    for _ in range(3):
        assert list(first) == list(second)


def test_the_order_of_prompts_has_a_seed_of_its_own(tiny_model_path: str, tmp_path: Path) -> None:
    orders = [list(grpo_of(tmp_path, tiny_model_path, order_seed=seed)._get_train_sampler()) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_without_more_arguments_training_is_trls(kind: str, tiny_model_path: str, tmp_path: Path) -> None:
    theirs = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    ours = MAKERS[kind](tmp_path, tiny_model_path)
    ours.train()
    bare = trl(*theirs, tmp_path, tiny_model_path, tiny_model_path)
    bare.train()
    assert equal(bits(ours.model), bits(bare.model))
    assert log_of(ours, "loss") == log_of(bare, "loss")


@pytest.mark.parametrize(("kind", "config"), [(ExactGRPOTrainer, GRPOConfig), (ExactRLOOTrainer, RLOOConfig)])
def test_the_reference_is_the_policy_that_was_given(
    kind: Any, config: Any, tiny_model_path: str, tmp_path: Path
) -> None:
    trainer = trl(kind, config, tmp_path, perturbed(load(tiny_model_path)), tiny_model_path)
    assert equal(bits(trainer.ref_model), bits(trainer.model))
    trainer.train()
    assert log_of(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)


def test_a_checkpoint_of_another_trainer_is_refused(tiny_model_path: str, tmp_path: Path) -> None:
    given = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trl(GRPOTrainer, GRPOConfig, tmp_path, tiny_model_path, tiny_model_path, **given).train()
    trainer = grpo_of(tmp_path, tiny_model_path, max_steps=4)
    with pytest.raises(StageError, match=r"checkpoint-2 has no rollout\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_t15_too_few_prompts_are_an_error(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = grpo_of(tmp_path, tiny_model_path, rows=3)
    with pytest.raises(ConfigError, match="8 completions, 2 of each prompt, needs 4 prompts, but the data have 3"):
        trainer.train()


def test_a_group_can_be_generated_in_parts(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = grpo_of(tmp_path, tiny_model_path, chunk_size=3)
    trainer.train()
    assert trainer.state.global_step == 4


def learned_positions() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
    return GPT2LMHeadModel(config).eval()


ROW = torch.tensor([[5, 6, 7, 8, 9]])
PADDED = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])


@torch.no_grad()
def test_learned_positions_count_from_the_first_token() -> None:
    model = learned_positions()
    alone = model(ROW).logits
    assert (model(PADDED, attention_mask=MASK).logits[:, 3:] - alone).abs().max() > 0.01  # as transformers has it
    count_positions_from_the_first_token(model)
    torch.testing.assert_close(model(input_ids=PADDED, attention_mask=MASK).logits[:, 3:], alone)
    torch.testing.assert_close(model(PADDED, attention_mask=MASK).logits[:, 3:], alone)
    torch.testing.assert_close(model(ROW).logits, alone)


def test_generation_keeps_its_own_positions() -> None:
    model = learned_positions()
    plain = model.generate(ROW, max_new_tokens=6, do_sample=False)[:, 5:]
    count_positions_from_the_first_token(model)
    padded = model.generate(PADDED, attention_mask=MASK, max_new_tokens=6, do_sample=False)[:, 8:]
    assert torch.equal(plain, padded)


def test_rotary_positions_are_left_alone(tiny_model_path: str) -> None:
    model = load(tiny_model_path)
    count_positions_from_the_first_token(model)
    assert not model.base_model._forward_pre_hooks


def test_policy_reference_and_value_model_with_learned_positions_score_a_padded_row_alike(
    tiny_model_path: str, tmp_path: Path
) -> None:
    learned_positions().save_pretrained(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "gpt2")
    trainer = ppo(tmp_path, str(tmp_path / "gpt2"), processing_class=tokenizer, max_completion_length=4)
    rows = {
        "prompt_ids": ROW[:, :3], "prompt_mask": torch.ones(1, 3, dtype=torch.long),
        "completion_ids": ROW[:, 3:], "completion_mask": torch.ones(1, 2, dtype=torch.long),
    }  # fmt: skip
    padded = {**rows, "prompt_ids": PADDED[:, :6], "prompt_mask": MASK[:, :6]}
    for of in (lambda batch: trainer._score_again(batch).logps, trainer._values_of):
        torch.testing.assert_close(of(padded), of(rows), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        scored = [
            trainer._get_per_token_logps_and_entropies(
                trainer.ref_model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                2,
            )[0]
            for batch in (rows, padded)
        ]
    torch.testing.assert_close(scored[0], scored[1], rtol=1e-5, atol=1e-5)
