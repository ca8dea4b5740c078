"""The numbers of PPO against closed forms, sums written out, and invariants."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagekit.trainers.ppo_losses import (
    KLEstimator,
    explained_variance,
    gae,
    kl_estimate,
    last_token,
    masked_mean,
    masked_variance,
    token_rewards,
    value_clipped,
    value_loss,
    whiten,
)


RAGGED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1]]).float()
"""A whole row, a short one, one token, none, and one with what a tool said in its middle."""


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_sum(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """GAE as the sum over all later tokens, of one row without gaps."""
    length = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_sum_over_later_tokens_without_the_masked_ones(gamma: float, gae_lambda: float) -> None:
    rewards, values = random(1, 5, 5), random(2, 5, 5)
    advantages, returns = gae(rewards, values, RAGGED, gamma, gae_lambda)
    for row in range(5):
        kept = RAGGED[row].bool()
        expected = by_sum(rewards[row][kept].tolist(), values[row][kept].tolist(), gamma, gae_lambda)
        torch.testing.assert_close(advantages[row][kept].tolist(), expected)
        assert not advantages[row][~kept].any()
        assert not returns[row][~kept].any()


def test_gae_with_lambda_1_is_the_rewards_to_come_minus_the_value() -> None:
    rewards, values = random(3, 2, 6), random(4, 2, 6)
    advantages, _ = gae(rewards, values, torch.ones(2, 6), 1.0, 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, to_come - values)


def test_gae_with_lambda_0_is_the_temporal_difference() -> None:
    rewards, values = random(3, 2, 6), random(4, 2, 6)
    advantages, _ = gae(rewards, values, torch.ones(2, 6), 0.9, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * after - values)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
def test_returns_are_advantages_plus_values(seed: int, gamma: float, gae_lambda: float) -> None:
    rewards, values = random(seed, 5, 5), random(seed + 1, 5, 5)
    advantages, returns = gae(rewards, values, RAGGED, gamma, gae_lambda)
    torch.testing.assert_close(returns, (advantages + values) * RAGGED)


def test_the_score_is_on_the_last_token_only_and_the_penalty_on_every_one() -> None:
    scores, penalties = random(5, 5), random(6, 5, 5)
    rewards = token_rewards(scores, penalties, RAGGED.double())
    assert last_token(RAGGED).tolist() == [
        [0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
    torch.testing.assert_close(rewards.sum(1), scores * torch.tensor([1, 1, 1, 0, 1]) - (penalties * RAGGED).sum(1))
    assert float(rewards[0, 4]) == pytest.approx(float(scores[0] - penalties[0, 4]))
    assert float(rewards[0, 3]) == pytest.approx(float(-penalties[0, 3]))


def test_kl_estimates_over_all_tokens_are_the_kl() -> None:
    policy, reference = random(7, 6).softmax(0), random(8, 6).softmax(0)
    kl = float((policy * (policy / reference).log()).sum())

    def expected(kind: KLEstimator) -> float:
        return float((policy * kl_estimate(policy.log(), reference.log(), kind)).sum())

    assert expected("k1") == pytest.approx(kl)
    assert expected("k3") == pytest.approx(kl)
    assert expected("k2") == pytest.approx(float((policy * (policy / reference).log().square() / 2).sum()))


@settings(max_examples=50, deadline=None)
@given(policy=st.floats(-20, 0), reference=st.floats(-20, 0))
def test_k2_and_k3_are_never_negative_and_zero_where_both_agree(policy: float, reference: float) -> None:
    for kind in ("k2", "k3"):
        assert float(kl_estimate(torch.tensor(policy), torch.tensor(reference), kind)) >= 0  # type: ignore[arg-type]
        assert float(kl_estimate(torch.tensor(policy), torch.tensor(policy), kind)) == 0  # type: ignore[arg-type]


def test_whitened_numbers_have_mean_0_and_deviation_1_over_the_unmasked() -> None:
    x = random(9, 5, 5) * 3 + 7
    white = whiten(x, RAGGED)
    assert float(masked_mean(white, RAGGED)) == pytest.approx(0, abs=1e-6)
    assert float(masked_variance(white, RAGGED)) == pytest.approx(1, rel=1e-5)
    assert not white[RAGGED == 0].any()


def test_whitening_can_leave_the_mean() -> None:
    x = random(9, 5, 5) * 3 + 7
    white = whiten(x, RAGGED, shift_mean=False)
    assert float(masked_mean(white, RAGGED)) == pytest.approx(float(masked_mean(x, RAGGED)), rel=1e-5)
    assert float(masked_variance(white, RAGGED)) == pytest.approx(1, rel=1e-5)


def test_two_processes_whiten_as_one_would_the_union() -> None:
    x, mask = random(10, 5, 5), RAGGED
    whole = whiten(x, mask)
    meet, sent = Barrier(2), dict[int, torch.Tensor]()

    def process(rank: int) -> torch.Tensor:
        def add(mine: torch.Tensor) -> torch.Tensor:
            sent[rank] = mine
            meet.wait(10)
            total = sent[0] + sent[1]
            meet.wait(10)
            return total

        rows = slice(0, 2) if rank == 0 else slice(2, 5)
        return whiten(x[rows], mask[rows], reduce=add)

    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(torch.cat(list(pool.map(process, range(2)))), whole)


TABLE = [
    # value, old value, return, clip -> loss, clipped
    (1.1, 1.0, 2.0, 0.2, 0.5 * 0.9**2, 0),  # inside the range
    (1.5, 1.0, 2.0, 0.2, 0.5 * 0.8**2, 1),  # moved up too far, towards the return: no gradient
    (0.5, 1.0, 2.0, 0.2, 0.5 * 1.5**2, 0),  # moved down too far, away from the return: pulled back
    (0.5, 1.0, 0.0, 0.2, 0.5 * 0.8**2, 1),  # moved down too far, towards the return
    (1.5, 1.0, 2.0, None, 0.5 * 0.5**2, 0),  # no range
]


@pytest.mark.parametrize(("value", "old", "target", "clip", "loss", "clipped"), TABLE)
def test_the_value_loss_by_hand(
    value: float, old: float, target: float, clip: float | None, loss: float, clipped: int
) -> None:
    now = torch.tensor([[value]], requires_grad=True)
    before, returns = torch.tensor([[old]]), torch.tensor([[target]])
    found = value_loss(now, before, returns, clip)
    assert found.item() == pytest.approx(loss)
    assert int(value_clipped(now, before, returns, clip)) == clipped
    found.sum().backward()
    assert now.grad is not None
    assert bool(now.grad.any()) != bool(clipped)


def test_explained_variance_of_a_perfect_and_of_a_constant_value_model() -> None:
    returns = random(11, 5, 5)

    def explained(values: Any) -> float:
        return float(explained_variance(values, returns, RAGGED))

    assert explained(returns) == pytest.approx(1)
    assert explained(returns + 3) == pytest.approx(1)
    assert explained(torch.full_like(returns, 0.3)) == pytest.approx(0)
    assert math.isnan(float(explained_variance(returns, torch.zeros_like(returns), RAGGED)))
