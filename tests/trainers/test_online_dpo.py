"""Online DPO: the loss by hand, ln 2 at the start, the fixed point, resume."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from stagekit.errors import ConfigError
from stagekit.losses import soft_label_dpo_loss
from stagekit.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer, preference
from tests.trainers.rl import arguments, bits, equal, letters, load, log_of, perturbed, prompts


def online(folder: Path, model: Any, path: str, reward: Any = letters, **options: Any) -> OnlineDPOTrainer:
    given = {"train_dataset": prompts(options.pop("rows", 16)), "eval_dataset": options.pop("eval_dataset", None)}
    args = OnlineDPOConfig(**arguments(folder, **options))
    return OnlineDPOTrainer(model, reward, args, processing_class=AutoTokenizer.from_pretrained(path), **given)


def rollout(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    rows = [trainer.train_dataset[row] for row in range(4) for _ in range(2)]
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    found: dict[str, Any] = trainer._generate_and_score_completions(rows)
    return found


def test_before_the_first_step_the_loss_is_ln_2(tiny_model_path: str, tmp_path: Path) -> None:
    for scale in (None, 0.5):
        given = {"gradient_accumulation_steps": 2, "preference_scale": scale, "max_steps": 3}
        trainer = online(tmp_path, perturbed(load(tiny_model_path)), tiny_model_path, **given)
        trainer.train()
        assert log_of(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
        assert log_of(trainer, "loss")[2] != pytest.approx(math.log(2), abs=1e-5)
        assert log_of(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_loss_by_hand(scale: float | None, tiny_model_path: str, tmp_path: Path) -> None:
    trainer = online(tmp_path, load(tiny_model_path), tiny_model_path, beta=0.3, preference_scale=scale)
    perturbed(trainer.model, 1)
    batch = rollout(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    tokenizer, losses = trainer.processing_class, []
    for pair in range(4):
        ratios, scores = [], []
        for side in range(2):
            prompt = batch["prompt_ids"][pair, side][batch["prompt_mask"][pair, side].bool()]
            answer = batch["completion_ids"][pair, side][batch["completion_mask"][pair, side].bool()]
            ids = torch.cat([prompt, answer])[None]
            sums = []
            for model in (trainer.model, trainer.ref_model):
                logps = type(model).forward(model, input_ids=ids).logits[0, :-1].log_softmax(-1)
                sums.append(logps.gather(-1, ids[0, 1:, None])[-len(answer) :].sum())
            ratios.append(sums[0] - sums[1])
            scores.append(letters(None, [tokenizer.decode(answer, skip_special_tokens=True)])[0])
        x, difference = 0.3 * (ratios[0] - ratios[1]), scores[0] - scores[1]
        chance = 1 / (1 + math.exp(-difference / scale)) if scale else float(difference > 0)
        if scale or difference:
            logsigmoid = torch.nn.functional.logsigmoid
            losses.append(-chance * logsigmoid(x) - (1 - chance) * logsigmoid(-x))
    assert losses
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


def test_the_loss_is_least_where_the_policy_is_the_reference_times_the_exponential_of_the_score() -> None:
    """A policy of four answers, over all pairs: the gradient is 0 there, and descent ends there."""
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    scores = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)
    beta, scale = 0.5, 2.0
    best = reference * (scores / (beta * scale)).exp()
    best /= best.sum()
    logits = reference.log().clone().requires_grad_(True)
    one, other = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    chances, decided = preference(scores[one.flatten()], scores[other.flatten()], scale)

    def loss() -> torch.Tensor:
        ratios = logits.log_softmax(0) - reference.log()
        delta = ratios[one.flatten()] - ratios[other.flatten()]
        sampled = logits.softmax(0).detach()
        weights = sampled[one.flatten()] * sampled[other.flatten()] * decided
        return (soft_label_dpo_loss(delta, beta, chances) * weights).sum()

    optimiser = torch.optim.SGD([logits], lr=20.0)
    for _ in range(3000):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    torch.testing.assert_close(logits.softmax(0).detach(), best, rtol=1e-4, atol=1e-5)


def test_a_preference_without_a_scale_is_certain_and_ties_say_nothing() -> None:
    first, second = torch.tensor([1.0, 0.0, 2.0, math.nan]), torch.tensor([0.0, 1.0, 2.0, 1.0])
    chances, decided = preference(first, second, None)
    assert chances[:2].tolist() == [1, 0]
    assert decided.tolist() == [1, 1, 0, 0]
    soft, known = preference(first, second, 1.0)
    assert soft[2] == 0.5
    assert known.tolist() == [1, 1, 1, 0]


def test_the_loss_depends_on_the_minibatch_and_not_on_its_parts(tiny_model_path: str, tmp_path: Path) -> None:
    norms = []
    for size, parts in ((8, 1), (4, 2), (2, 4)):
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        trainer = online(tmp_path, tiny_model_path, tiny_model_path, **given)
        trainer.train()
        norms.append(log_of(trainer, "grad_norm")[0])
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-3)


def test_a_completion_that_does_not_end_is_worse(tiny_model_path: str, tmp_path: Path) -> None:
    given = {
        "missing_eos_penalty": 3.0,
        "max_completion_length": 24,
        "reward": lambda prompts, **_: [0.0] * len(prompts),
    }
    trainer = online(tmp_path, tiny_model_path, tiny_model_path, **given)
    batch = rollout(trainer)
    last = batch["completion_ids"].flatten(0, 1).gather(1, batch["completion_mask"].flatten(0, 1).sum(1)[:, None] - 1)
    ends = torch.isin(last, torch.tensor(trainer.eos_token_ids)).view(-1, 2)
    different = ends[:, 0] != ends[:, 1]
    assert different.any()
    assert torch.equal(batch["decided"].bool(), different)
    assert torch.equal(batch["chances"][different].bool(), ends[different, 0])


@pytest.mark.parametrize("step", [4, 6])
def test_a_killed_run_goes_on_with_the_same_bits(step: int, tiny_model_path: str, tmp_path: Path) -> None:
    given = {"max_steps": 12, "save_strategy": "steps", "save_steps": step, "num_iterations": 2}
    whole = online(tmp_path / "whole", tiny_model_path, tiny_model_path, **given)
    whole.train()
    again = online(tmp_path / "again", tiny_model_path, tiny_model_path, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / f"checkpoint-{step}"))
    assert equal(bits(again.model), bits(whole.model))


def test_an_evaluation_compares_without_training(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = online(tmp_path, tiny_model_path, tiny_model_path, eval_dataset=prompts(4), preference_scale=1.0)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert "eval_reward" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 4}, "online DPO compares two"),
        ({"beta": 0.0}, "beta: 0.0 is not above 0"),
        ({"loss_type": "grpo"}, "loss_type: 'grpo' has no effect"),
        ({"preference_scale": 0.0}, "None has no scale"),
        ({"per_device_train_batch_size": 1}, "cut a pair"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], message: str, tiny_model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        online(tmp_path, tiny_model_path, tiny_model_path, **options)


@pytest.mark.slow
def test_the_score_rises(tiny_model_path: str, tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 16, "generation_batch_size": 64, "max_completion_length": 12}
    trainer = online(tmp_path, tiny_model_path, tiny_model_path, rows=32, max_steps=60, **given)
    trainer.train()
    scores = log_of(trainer, "reward")
    assert sum(scores[-3:]) > 1.5 * sum(scores[:3])
