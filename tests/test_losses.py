"""Preference losses: numbers worked out by hand, limits, identities, and gradients against finite differences."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from stagekit.losses import (
    cpo_loss,
    hinge_loss,
    log1mexp,
    log_odds_ratio,
    odds_ratio_loss,
    simpo_loss,
    soft_label_dpo_loss,
)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_hinge_asks_for_its_margin() -> None:
    # 0.5 * 3 = 1.5: two short of 3.5, half short of 2, enough for 1.
    delta = number(3.0)
    assert [float(hinge_loss(delta, 0.5, margin)) for margin in (3.5, 2.0, 1.0)] == [2.0, 0.5, 0.0]
    assert float(hinge_loss(number(0.0), 0.5)) == 1.0


def test_hinge_with_a_margin_of_zero_learns_nothing_at_the_reference() -> None:
    delta = number(0.0).requires_grad_()
    hinge_loss(delta, 0.1, 0.0).sum().backward()
    assert delta.grad is not None and float(delta.grad) == 0.0


def test_soft_labels_by_hand() -> None:
    # x = 0.5 * 2 = 1: -log sigma(1) = log(1 + e^-1) = 0.3132617, -log sigma(-1) = 1.3132617.
    loss = soft_label_dpo_loss(number(2.0), 0.5, number(0.75))
    assert float(loss) == pytest.approx(0.75 * 0.3132616875 + 0.25 * 1.3132616875, abs=1e-9)
    assert float(soft_label_dpo_loss(number(0.0), 0.1, number(0.3))) == pytest.approx(math.log(2), abs=1e-12)


def test_a_certain_label_is_dpo_and_swapping_the_pair_is_one_minus_p() -> None:
    delta = torch.linspace(-30, 30, 13, dtype=torch.float64)
    assert torch.equal(soft_label_dpo_loss(delta, 0.1, 1.0), -logsigmoid(0.1 * delta))
    torch.testing.assert_close(soft_label_dpo_loss(-delta, 0.1, 0.8), soft_label_dpo_loss(delta, 0.1, 0.2))


def test_cdpo_is_least_at_the_log_odds_of_its_label() -> None:
    # logit(0.9) = log 9 = 2.197225
    x = torch.linspace(2.0, 2.4, 400_001, dtype=torch.float64)
    best = x[soft_label_dpo_loss(x, 1.0, 0.9).argmin()]
    assert float(best) == pytest.approx(math.log(9), abs=1e-5)
    at = number(math.log(9)).requires_grad_()
    soft_label_dpo_loss(at, 1.0, 0.9).sum().backward()
    assert at.grad is not None and abs(float(at.grad)) < 1e-15


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.3, 0.49])
def test_cdpo_is_a_weighted_sum_of_sigmoid_and_robust(epsilon: float) -> None:
    x = torch.linspace(-5, 5, 21, dtype=torch.float64)
    sigmoid = -logsigmoid(x)
    robust = (-(1 - epsilon) * logsigmoid(x) + epsilon * logsigmoid(-x)) / (1 - 2 * epsilon)
    weighted = 2 * (1 - epsilon) * sigmoid - (1 - 2 * epsilon) * robust
    torch.testing.assert_close(weighted, soft_label_dpo_loss(x, 1.0, 1 - epsilon))


def test_cpo_by_hand() -> None:
    # 0.5 * (-2 - -6) = 2, less a margin of 1: -log sigma(1) = 0.3132617.
    assert float(cpo_loss(number(-2.0), number(-6.0), 0.5, margin=1.0)) == pytest.approx(0.3132616875, abs=1e-9)
    assert float(cpo_loss(number(-3.0), number(-3.0), 0.5)) == pytest.approx(math.log(2), abs=1e-12)


def test_simpo_by_hand() -> None:
    # 2 * (-0.5 - -1.25) - 0.5 = 1
    assert float(simpo_loss(number(-0.5), number(-1.25), 2.0, 0.5)) == pytest.approx(0.3132616875, abs=1e-9)
    # beta -> 0 leaves the margin alone: -log sigma(-0.5) = log(1 + e^0.5)
    assert float(simpo_loss(number(-0.5), number(-9.0), 0.0, 0.5)) == pytest.approx(
        math.log1p(math.exp(0.5)), abs=1e-12
    )


def test_odds_ratio_by_hand() -> None:
    # P = 3/4 has odds 3, P = 1/2 odds 1, so the ratio is 3 and sigma(log 3) = 3/4.
    chosen, rejected = number(math.log(0.75)), number(math.log(0.5))
    assert float(log_odds_ratio(chosen, rejected)) == pytest.approx(math.log(3), abs=1e-12)
    assert float(odds_ratio_loss(chosen, rejected)) == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert float(odds_ratio_loss(chosen, chosen)) == pytest.approx(math.log(2), abs=1e-12)


def test_log1mexp_is_exact_at_both_ends() -> None:
    # log(1/2); log(1 - e^-1e-10) = log 1e-10, where the plain formula has 7 digits left; log(1 - e^-50) = -e^-50
    assert float(log1mexp(number(-math.log(2)))) == pytest.approx(-math.log(2), abs=1e-15)
    assert float(log1mexp(number(-1e-10))) == pytest.approx(math.log(1e-10), rel=1e-11)
    assert float(log1mexp(number(-50.0))) == pytest.approx(-math.exp(-50), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -1e-9, -1e-3, -0.6931471, -0.6931472, -1.0, -100.0])
def test_log1mexp_and_its_gradient_are_finite_in_float32(value: float) -> None:
    x = torch.tensor([value], requires_grad=True)
    out = log1mexp(x)
    out.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()


def test_the_odds_of_a_memorised_answer_have_a_finite_gradient() -> None:
    # In float32 exp(-1e-9) is 1; without the guard of log1mexp this is NaN.
    chosen, rejected = torch.tensor([-1e-9], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    odds_ratio_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None and torch.isfinite(chosen.grad).all()
    assert rejected.grad is not None and torch.isfinite(rejected.grad).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: hinge_loss(a - b, 0.3, 2.0),
        lambda a, b: soft_label_dpo_loss(a - b, 0.3, 0.7),
        lambda a, b: cpo_loss(a, b, 0.3, 0.5),
        lambda a, b: simpo_loss(a, b, 2.0, 1.0),
        lambda a, b: odds_ratio_loss(a, b),
    ],
    ids=["hinge", "soft", "cpo", "simpo", "odds"],
)
def test_gradients_are_those_of_finite_differences(loss: object) -> None:
    chosen = torch.tensor([-0.2, -1.1, -2.5, -4.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.4, -0.9, -5.0, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (chosen, rejected))
