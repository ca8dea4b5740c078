"""Preference losses as functions of log-probabilities. They are written here once; what TRL computes is not.

Legend: B pairs of a batch. `logps` are summed over the completion's tokens, `avg_logps` averaged over them; both are
natural logarithms, so at most 0. `delta` is what the policy prefers the chosen completion by, in log-probability:
(log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), without `ref` in a reference-free loss.
Every loss gives one number per pair; a trainer takes the mean. sigma is the logistic function.
"""

import math

import torch
from torch.nn import functional


_ALMOST_ONE = -1e-30
"""Log of the largest probability that the odds are computed for; those of 1 are infinite."""


def hinge_loss(delta: torch.Tensor, beta: float, margin: float = 1.0) -> torch.Tensor:
    """max(0, m - beta * delta): no loss, and no gradient, once the pair is right by the margin.

    At policy == reference delta is 0, so the loss is m there, and a margin of 0 would never learn anything.

    Args:
        delta: (B,) by how much the policy prefers the chosen completion.
        beta: Scale of delta.
        margin: m. TRL's `hinge` is m = 1, SLiC's delta.

    Returns:
        (B,) losses.

    Source: huggingface.co/papers/2305.10425, equation 1, with the reference as in huggingface.co/papers/2309.06657.
    """
    return torch.relu(margin - beta * delta)


def soft_label_dpo_loss(delta: torch.Tensor, beta: float, chosen_prob: torch.Tensor | float) -> torch.Tensor:
    """-p log sigma(beta delta) - (1 - p) log sigma(-beta delta): DPO where chosen is better with probability p only.

    Least where beta * delta = log(p / (1 - p)). p = 1 is DPO; p = 1 - epsilon for every pair is conservative DPO
    (cDPO, label smoothing).

    Args:
        delta: (B,) by how much the policy prefers the chosen completion.
        beta: Strength of the tie to the reference.
        chosen_prob: (B,) or one number, p in 0..1.

    Returns:
        (B,) losses.

    Source: huggingface.co/papers/2305.18290, equation 7; ericmitchell.ai/cdpo.pdf, equation 3.
    """
    x = beta * delta
    return -chosen_prob * functional.logsigmoid(x) - (1 - chosen_prob) * functional.logsigmoid(-x)


def cpo_loss(
    chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, beta: float, margin: float = 0.0
) -> torch.Tensor:
    """-log sigma(beta (log pi(chosen) - log pi(rejected)) - m): DPO with a uniform reference, and a margin.

    The preference term of CPO; its other term is the cross-entropy of the chosen completion. The paper has m = 0.

    Args:
        chosen_logps: (B,)
        rejected_logps: (B,)
        beta: Scale of the log-probabilities.
        margin: m, in units of the reward beta * log pi.

    Returns:
        (B,) losses.

    Source: huggingface.co/papers/2401.08417, equation 3.
    """
    return -functional.logsigmoid(beta * (chosen_logps - rejected_logps) - margin)


def simpo_loss(
    chosen_avg_logps: torch.Tensor, rejected_avg_logps: torch.Tensor, beta: float, gamma: float
) -> torch.Tensor:
    """-log sigma(beta / |chosen| log pi(chosen) - beta / |rejected| log pi(rejected) - gamma): SimPO.

    Args:
        chosen_avg_logps: (B,)
        rejected_avg_logps: (B,)
        beta: Scale of the reward, 2 to 10; not DPO's 0.1.
        gamma: Target margin of the rewards, often beta / 2.

    Returns:
        (B,) losses.

    Source: huggingface.co/papers/2405.14734, equation 6.
    """
    return -functional.logsigmoid(beta * (chosen_avg_logps - rejected_avg_logps) - gamma)


def log_odds_ratio(chosen_avg_logps: torch.Tensor, rejected_avg_logps: torch.Tensor) -> torch.Tensor:
    """log(odds(chosen) / odds(rejected)) with odds(y) = P(y) / (1 - P(y)), P(y) the geometric mean over y's tokens.

    Args:
        chosen_avg_logps: (B,)
        rejected_avg_logps: (B,)

    Returns:
        (B,), finite also where a P(y) is 1.

    Source: huggingface.co/papers/2403.07691, equations 4 and 5.
    """
    return (chosen_avg_logps - rejected_avg_logps) - (log1mexp(chosen_avg_logps) - log1mexp(rejected_avg_logps))


def odds_ratio_loss(chosen_avg_logps: torch.Tensor, rejected_avg_logps: torch.Tensor) -> torch.Tensor:
    """-log sigma(log(odds(chosen) / odds(rejected))): the term that ORPO adds, times lambda, to the cross-entropy.

    Args:
        chosen_avg_logps: (B,)
        rejected_avg_logps: (B,)

    Returns:
        (B,) losses.

    Source: huggingface.co/papers/2403.07691, equation 7.
    """
    return -functional.logsigmoid(log_odds_ratio(chosen_avg_logps, rejected_avg_logps))


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, without cancellation; a finite number with a finite gradient also at 0.

    Each branch sees only values that it is exact for: the gradient of the other one would be 0 * inf, which is NaN.

    Args:
        x: Any shape.

    Source: Maechler, Accurately computing log(1 - exp(-|a|)), equation 7 (cran.r-project.org/package=Rmpfr).
    """
    x = x.clamp(max=_ALMOST_ONE)
    small = x < -math.log(2)
    by_log1p = torch.log1p(-torch.exp(torch.where(small, x, -math.log(2))))
    by_expm1 = torch.log(-torch.expm1(torch.where(small, -math.log(2), x)))
    return torch.where(small, by_log1p, by_expm1)
