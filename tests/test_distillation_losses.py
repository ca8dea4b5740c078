"""Distillation losses: numbers worked out by hand, closed forms, limits, gradients, and maps of layers."""

import itertools
import math
from typing import Any

import pytest
import torch

from stagekit.distillation_losses import (
    auto_layer_map,
    bucketed,
    divergence,
    hidden_state_loss,
    kl,
    layer_pairs,
    soften,
)
from stagekit.errors import ConfigError


KINDS: tuple[Any, ...] = ("forward_kl", "reverse_kl", "jsd", "skewed_kl")


def logits(seed: int, rows: int = 4, words: int = 12, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, words, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_divergences_of_three_words_by_hand() -> None:
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2). KL(q||p) = 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2, and so is KL(p||q).
    The even mixture m = (3/8, 1/4, 3/8): KL(q||m) = 1/2 ln 4/3 + 1/4 ln 2/3 = 0.0424756, and KL(p||m) is the same."""
    q, p = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert float(divergence(p, q, "forward_kl")) == pytest.approx(0.25 * math.log(2), abs=1e-7)
    assert float(divergence(p, q, "reverse_kl")) == pytest.approx(0.25 * math.log(2), abs=1e-7)
    by_hand = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert float(divergence(p, q, "jsd")) == pytest.approx(by_hand, abs=1e-7)
    assert float(divergence(p, q, "skewed_kl", 0.5)) == pytest.approx(by_hand, abs=1e-7)
    # lambda = 0.1: m = (0.275, 0.25, 0.475)
    skewed = 0.5 * math.log(0.5 / 0.275) + 0.25 * math.log(0.25 / 0.475)
    assert float(divergence(p, q, "skewed_kl")) == pytest.approx(skewed, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_are_those_of_finite_differences(kind: Any, temperature: float) -> None:
    teacher = soften(logits(1), temperature)
    given = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(soften(z, temperature), teacher, kind), given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_costs_nothing(kind: Any) -> None:
    both = soften(logits(0, dtype=torch.float32), 2.0)
    found = divergence(both, both.clone(), kind)
    if kind in ("forward_kl", "reverse_kl"):
        assert torch.equal(found, torch.zeros(4))  # exactly; a mixture is rounded once more
    assert float(found.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_above_zero_where_the_distributions_differ(kind: Any) -> None:
    assert float(divergence(soften(logits(0), 1.0), soften(logits(1), 1.0), kind).min()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_square_of_the_temperature_the_gradient_does_not_fall_with_it(kind: Any) -> None:
    """Near agreement the gradient of T^2 KL at T is that at 1: 2 % from 1 to 8. Without T^2 it falls to 1/64."""
    student = 0.02 * logits(0)
    teacher = student + 0.02 * logits(1)

    def norm(temperature: float) -> float:
        given = student.clone().requires_grad_()
        divergence(soften(given, temperature), soften(teacher, temperature), kind).sum().backward()
        assert given.grad is not None
        return float(given.grad.norm())

    for temperature in (2.0, 4.0, 8.0):
        assert temperature**2 * norm(temperature) == pytest.approx(norm(1.0), rel=0.02)
    assert norm(8.0) < norm(1.0) / 50


def test_at_a_high_temperature_it_is_half_the_variance_of_the_difference() -> None:
    """T^2 KL -> 1/2 mean_v (dz - mean dz)^2 for T -> infinity, the first neglected term is of order 1/T."""
    student, teacher = logits(0), logits(1)
    limit = 0.5 * (student - teacher).var(dim=-1, unbiased=False)
    found = [t**2 * divergence(soften(student, t), soften(teacher, t), "forward_kl") for t in (16.0, 100.0)]
    torch.testing.assert_close(found[1], limit, rtol=0.02, atol=0)
    assert float((found[1] - limit).abs().max()) < float((found[0] - limit).abs().max())


def least(loss: Any, words: int) -> torch.Tensor:
    """The distribution that the loss of free logits is least at."""
    free = torch.zeros(1, words, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value: torch.Tensor = loss(free)
        value.backward()
        return value

    optimiser.step(closure)
    return free.detach()


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_at_temperature_one_the_best_student_is_the_mixture_of_teacher_and_data(alpha: float) -> None:
    teacher, data = soften(logits(1, 1, 5), 1.0), soften(logits(2, 1, 5), 1.0).exp()

    def loss(z: torch.Tensor) -> torch.Tensor:
        p = soften(z, 1.0)
        return (alpha * divergence(p, teacher, "forward_kl") - (1 - alpha) * (data * p).sum(-1)).sum()

    found = soften(least(loss, 5), 1.0).exp()
    torch.testing.assert_close(found, alpha * teacher.exp() + (1 - alpha) * data, rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_the_best_student_is_the_teacher_at_any_temperature(temperature: float, kind: Any) -> None:
    teacher = logits(1, 1, 5)
    softened = soften(teacher, temperature)
    found = least(lambda z: temperature**2 * divergence(soften(z, temperature), softened, kind).sum(), 5)
    torch.testing.assert_close(soften(found, 1.0).exp(), soften(teacher, 1.0).exp(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_of_the_top_k_rises_with_k_to_the_full_one(kind: Any) -> None:
    student, teacher = soften(logits(0), 1.0), soften(logits(1), 1.0)
    order = teacher.argsort(dim=-1, descending=True)
    found = [divergence(bucketed(student, order[:, :k]), bucketed(teacher, order[:, :k]), kind) for k in range(1, 12)]
    full = divergence(student, teacher, kind)
    assert float(found[0].min()) >= 0
    for less, more in zip(found, [*found[1:], full], strict=True):
        assert bool((less <= more + 1e-12).all())
    torch.testing.assert_close(found[-1], full)  # eleven of twelve, and the rest is the twelfth


def test_buckets_keep_all_of_the_mass_and_a_rest_without_any_is_finite() -> None:
    kept = bucketed(soften(logits(0), 1.0), torch.tensor([[0, 3], [1, 2], [5, 4], [7, 0]]))
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    certain = soften(torch.tensor([[300.0, 0.0, 0.0]]), 1.0)
    assert bool(bucketed(certain, torch.tensor([[0]])).isfinite().all())
    rest = bucketed(certain, torch.tensor([[0]]))
    assert float(kl(rest, rest)) == 0.0


def test_hidden_states_that_differ_in_scale_only_cost_nothing() -> None:
    state = logits(0, 3, 8, torch.float32)
    assert torch.equal(hidden_state_loss(state, state.clone()), torch.zeros(3))
    assert float(hidden_state_loss(state, 7 * state).max()) < 1e-10
    assert float(hidden_state_loss(state, 7 * state, "mse").min()) > 1
    assert float(hidden_state_loss(state, 7 * state, "cosine").abs().max()) < 1e-6


def test_the_normalised_distance_is_twice_the_cosine_s() -> None:
    one, other = logits(0, 6, 8, torch.float32), logits(1, 6, 8, torch.float32)
    torch.testing.assert_close(hidden_state_loss(one, other), 2 * hidden_state_loss(one, other, "cosine"))


def test_the_distances_of_two_states_by_hand() -> None:
    """(3, 4) and (4, 3): mean square difference 1; cosine 24/25, so 2 (1 - cos) = 0.08."""
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    found = [float(hidden_state_loss(one, other, kind)) for kind in ("rms_mse", "mse", "cosine")]
    assert found == pytest.approx([0.08, 1.0, 0.04], abs=1e-6)


def test_the_automatic_map_is_sane_for_every_pair_of_depths_up_to_48() -> None:
    for theirs in range(1, 49):
        for ours in range(1, 49):
            found = list(auto_layer_map(theirs, ours).items())
            assert len(found) == min(theirs, ours)
            assert found[-1] == (theirs - 1, ours - 1)
            assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(found))
            assert all(0 <= a < theirs and 0 <= b < ours for a, b in found)
            if theirs == ours:
                assert all(a == b for a, b in found)
            elif theirs % ours == 0:
                step = theirs // ours  # TinyBERT's g(m) = m * N_T / N_S, counted from 1
                assert found == [((m + 1) * step - 1, m) for m in range(ours)]


@pytest.mark.parametrize(
    ("depths", "supervised"),
    [
        ((12, 1), [11]), ((12, 2), [5, 11]), ((12, 3), [3, 7, 11]), ((16, 1), [15]),
        ((16, 8), [1, 3, 5, 7, 9, 11, 13, 15]), ((6, 1), [5]), ((6, 4), [1, 2, 4, 5]),
    ],
)  # fmt: skip
def test_the_automatic_map_is_that_of_the_tables_made_by_hand(depths: tuple[int, int], supervised: list[int]) -> None:
    """LAYERS_TO_SUPERVISE of seq2seq-distillation, make_student.py:46-51."""
    assert list(auto_layer_map(*depths)) == supervised


def test_a_teacher_of_32_blocks_and_a_student_of_30_leave_two_out() -> None:
    assert sorted(set(range(32)) - set(auto_layer_map(32, 30))) == [0, 16]


def test_a_given_map_may_count_from_the_end() -> None:
    assert layer_pairs({-1: -1, 0: 0}, 4, 2) == [(0, 0), (3, 1)]
    assert layer_pairs({}, 4, 2) == [(1, 0), (3, 1)]


@pytest.mark.parametrize("given", [{4: 0}, {-5: 0}, {0: 2}])
def test_a_block_that_is_not_there_is_told(given: dict[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"layer_map: .* names block -?\d of the (teacher|student), which has"):
        layer_pairs(given, 4, 2)


def test_a_block_of_the_teacher_named_twice_is_refused_and_two_teachers_of_one_block_are_warned_of() -> None:
    with pytest.raises(ConfigError, match="names a block of the teacher twice"):
        layer_pairs({3: 0, -1: 1}, 4, 2)
    with pytest.warns(UserWarning, match="one block of the student towards several"):
        assert layer_pairs({0: 1, 3: 1}, 4, 2) == [(0, 1), (3, 1)]
