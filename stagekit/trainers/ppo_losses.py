"""The numbers of PPO as functions of tensors: KL estimates, rewards per token, advantages, whitening, the value loss.

Legend: B completions, T tokens of the longest one. `mask` is (B, T), 1 where the policy chose the token and 0 for
padding and for what a tool said; every function looks through the zeros as if those tokens were not there. `logps` are
natural logarithms. `reduce` sums a tensor over all processes; None: there is one process.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch


KLEstimator = Literal["k1", "k2", "k3"]
Reduce = Callable[[torch.Tensor], torch.Tensor]


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, kind: KLEstimator) -> torch.Tensor:
    """An estimate of KL(policy || reference) from each sampled token, with d = log pi - log ref.

    k1 = d and k3 = exp(-d) - 1 + d are unbiased, k2 = d^2 / 2 is not; k2 and k3 are never negative. Only k1 makes the
    expected sum over a completion its KL, and so the reward that of RLHF.

    Args:
        logps: (B, T) of the policy that sampled.
        ref_logps: (B, T) of the reference.
        kind: Which.

    Returns:
        (B, T).

    Source: joschu.net/blog/kl-approx.html.
    """
    log_ratio = logps - ref_logps
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


def last_token(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) with a single 1 in each row, on its last unmasked token; a row without one is all 0."""
    position = torch.arange(1, mask.size(1) + 1, device=mask.device)
    last = (mask * position).amax(dim=1, keepdim=True)
    return ((position == last) & (last > 0)).to(mask.dtype)


def token_rewards(scores: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Minus the penalty at every token, plus the score of the completion at its last one.

    Args:
        scores: (B,) what the reward functions gave.
        penalties: (B, T) what a token costs: the KL coefficient times the KL estimate.
        mask: (B, T)

    Returns:
        (B, T), 0 where masked.

    Source: huggingface.co/papers/2203.02155, equation 2, by token as in huggingface.co/papers/1909.08593.
    """
    return scores[:, None] * last_token(mask) - penalties * mask


class Advantages(NamedTuple):
    """What `gae` gives, (B, T) each and 0 where masked."""

    advantages: torch.Tensor
    """How much better a token was than the value model expected."""
    returns: torch.Tensor
    """What the value model should have said: advantages + values."""


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> Advantages:
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, with delta_t = r_t + gamma V_{t+1} - V_t.

    A completion ends with value 0, whether by EOS or by its length. gae_lambda = 1 gives the discounted sum of rewards
    minus V, gae_lambda = 0 gives delta.

    Args:
        rewards: (B, T)
        values: (B, T) V of the state that each token was chosen in.
        mask: (B, T)
        gamma: Discount per token, 0..1.
        gae_lambda: lambda, 0..1.

    Source: huggingface.co/papers/1506.02438, equation 16.
    """
    keep = mask.bool()
    advantages = torch.zeros_like(values)
    next_value, running = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * running
        running = torch.where(keep[:, t], advantage, running)
        next_value = torch.where(keep[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    return Advantages(advantages * mask, (advantages + values) * mask)


def masked_mean(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce | None = None) -> torch.Tensor:
    """The mean over unmasked tokens of all processes; 0 where there is none."""
    sums = _reduced(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]), reduce)
    return sums[0] / sums[1].clamp(min=1.0)


def masked_variance(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce | None = None) -> torch.Tensor:
    """The mean squared distance from the mean, over unmasked tokens of all processes."""
    return masked_mean((x - masked_mean(x, mask, reduce)).square(), mask, reduce)


def whiten(
    x: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True, reduce: Reduce | None = None
) -> torch.Tensor:
    """x with standard deviation 1 over the unmasked tokens of all processes, and mean 0 unless `shift_mean` is False.

    Args:
        x: (B, T)
        mask: (B, T)
        shift_mean: False leaves the mean where it was, so that signs stay as they are.
        reduce: Sums over processes.

    Returns:
        (B, T), 0 where masked.
    """
    mean = masked_mean(x, mask, reduce)
    scale = torch.rsqrt(masked_variance(x, mask, reduce) + 1e-8)
    return ((x - mean) * scale + (0.0 if shift_mean else mean)) * mask


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
) -> torch.Tensor:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) of each token.

    Args:
        values: (B, T) of the value model now.
        old_values: (B, T) of the value model when the completion was sampled.
        returns: (B, T)
        clip_range: eps, in units of the rewards. None: 0.5 (V - R)^2.

    Returns:
        (B, T), masked tokens included.

    Source: huggingface.co/papers/2005.12729, equation 3.
    """
    plain = (values - returns).square()
    if clip_range is None:
        return 0.5 * plain
    return 0.5 * torch.maximum(plain, (_clipped(values, old_values, clip_range) - returns).square())


def value_clipped(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
) -> torch.Tensor:
    """(B, T), 1 where `value_loss` took its clipped side, so that the value model learns nothing from the token."""
    if clip_range is None:
        return torch.zeros_like(values)
    clipped = (_clipped(values, old_values, clip_range) - returns).square()
    return (clipped > (values - returns).square()).to(values.dtype)


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce | None = None
) -> torch.Tensor:
    """1 - Var(R - V) / Var(R): 1 for a perfect value model, 0 for a constant one, NaN where all returns are equal."""
    variance = masked_variance(returns, mask, reduce)
    unexplained = masked_variance(returns - values, mask, reduce)
    return torch.where(variance > 0, 1 - unexplained / variance.clamp(min=1e-30), torch.nan)


def _clipped(values: torch.Tensor, old_values: torch.Tensor, clip_range: float) -> torch.Tensor:
    return old_values + (values - old_values).clamp(-clip_range, clip_range)


def _reduced(x: torch.Tensor, reduce: Reduce | None) -> torch.Tensor:
    return x if reduce is None else reduce(x)
