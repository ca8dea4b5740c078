"""What a student loses against its teacher: divergences of their distributions, distances of their hidden states.

Legend: N tokens that predict a label, V vocabulary, K tokens kept of a teacher's distribution, H hidden width.
q is the teacher's distribution, p the student's; log-probabilities are natural logarithms in float32. Every loss gives
one number per token; a trainer sums them and divides by the tokens of the batch.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn import functional

from stagekit.errors import ConfigError


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"]
HiddenLoss = Literal["rms_mse", "mse", "cosine"]

MIXTURE: Mapping[Divergence, float] = {"jsd": 0.5, "skewed_kl": 0.1}
"""Share of the teacher in the mixture that a divergence is measured against, where nothing else is said."""

MAX_TEMPERATURE = 100.0
"""float32 loses what is left of the divergence beyond: T^2 * KL is off by 1 % at 64 and by 10 % at 256."""

_NO_MASS = -100.0
"""Log of the least mass that the tokens outside a cache's top K are given; e^-100 changes no float32 sum."""


def soften(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(z / T), in float32 at least.

    Args:
        logits: (N, V), any float dtype.
        temperature: T.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.log_softmax(wide / temperature, dim=-1)


def kl(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_v p (log p - log q), exactly 0 where both are the same bits.

    Args:
        logp: (N, V)
        logq: (N, V)

    Returns:
        (N,)
    """
    return functional.kl_div(logq, logp, reduction="none", log_target=True).sum(dim=-1)


def divergence(
    student_logps: torch.Tensor, teacher_logps: torch.Tensor, kind: Divergence, mixture: float | None = None
) -> torch.Tensor:
    """How far the student's distribution is from the teacher's; without the factor T^2.

    forward_kl is KL(q || p), reverse_kl KL(p || q). With m = lambda q + (1 - lambda) p, skewed_kl is KL(q || m) and
    jsd is lambda KL(q || m) + (1 - lambda) KL(p || m).

    Args:
        student_logps: (N, V) log p.
        teacher_logps: (N, V) log q.
        kind: Which one.
        mixture: lambda, above 0 and below 1. None: 0.5 for jsd, 0.1 for skewed_kl; the others have none.

    Returns:
        (N,)

    Source: huggingface.co/papers/1503.02531 (forward KL), huggingface.co/papers/2306.13649, equation 1 (JSD),
    huggingface.co/papers/2402.03898, equation 3 (skew).
    """
    if kind == "forward_kl":
        return kl(teacher_logps, student_logps)
    if kind == "reverse_kl":
        return kl(student_logps, teacher_logps)
    share = MIXTURE[kind] if mixture is None else mixture
    mixed = torch.logaddexp(teacher_logps + math.log(share), student_logps + math.log1p(-share))
    from_teacher = kl(teacher_logps, mixed)
    return from_teacher if kind == "skewed_kl" else share * from_teacher + (1 - share) * kl(student_logps, mixed)


def bucketed(logps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A distribution over K tokens and, as one more class, all others together.

    A divergence of two such distributions is at most that of the full ones (data processing inequality).

    Args:
        logps: (N, V)
        ids: (N, K) which tokens, without repetition; K < V.

    Returns:
        (N, K+1), the rest last.
    """
    kept = logps.gather(-1, ids)
    rest = logps.scatter(-1, ids, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([kept, rest.clamp(min=_NO_MASS)], dim=-1)


def hidden_state_loss(student: torch.Tensor, teacher: torch.Tensor, kind: HiddenLoss = "rms_mse") -> torch.Tensor:
    """How far a hidden state of the student is from the teacher's.

    rms_mse divides each by its root mean square first and is 2 (1 - cos), free of scale; mse is dominated by the few
    tokens with the largest norms; cosine is 1 - cos.

    Args:
        student: (N, H), projected to the teacher's width.
        teacher: (N, H)
        kind: Which one.

    Returns:
        (N,), means over H.

    Source: huggingface.co/papers/1909.10351, equation 8 (mse); huggingface.co/papers/1910.01108 (cosine).
    """
    student, teacher = student.float(), teacher.float()
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
    if kind == "rms_mse":
        student, teacher = _unit_rms(student), _unit_rms(teacher)
    return (student - teacher).square().mean(dim=-1)


def _unit_rms(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + 1e-12)


def auto_layer_map(teacher_layers: int, student_layers: int) -> dict[int, int]:
    """Teacher block -> student block, spread evenly: strictly rising, last to last, the identity for equal depths.

    With n the smaller depth, pair k = 0..n-1 is block ceil((k+1) N / n) - 1 of each model of N blocks; where the
    depths divide, that is TinyBERT's uniform map.

    Source: huggingface.co/papers/1909.10351, section 3.1.
    """
    n = min(teacher_layers, student_layers)
    return {-(-k * teacher_layers // n) - 1: -(-k * student_layers // n) - 1 for k in range(1, n + 1)}


def layer_pairs(given: Mapping[int, int], teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
    """Pairs (teacher block, student block), from a map of the user's or, where it is empty, spread evenly.

    Args:
        given: Teacher block -> student block, from 0; negative ones count from the last.
        teacher_layers: How many blocks the teacher has.
        student_layers: How many the student has.

    Raises:
        ConfigError: a block that is not there.
    """
    if not given:
        return list(auto_layer_map(teacher_layers, student_layers).items())
    pairs = []
    for teacher, student in given.items():
        for block, layers, whose in ((teacher, teacher_layers, "teacher"), (student, student_layers, "student")):
            if not -layers <= block < layers:
                raise ConfigError(
                    f"layer_map: {teacher}: {student} names block {block} of the {whose}, which has {layers} "
                    f"(0 to {layers - 1}, or -{layers} to -1)"
                )
        pairs.append((teacher % teacher_layers, student % student_layers))
    if len({teacher for teacher, _ in pairs}) < len(pairs):
        raise ConfigError(f"layer_map: {dict(given)} names a block of the teacher twice, once from its end")
    if len({student for _, student in pairs}) < len(pairs):
        warnings.warn(
            f"layer_map: {dict(given)} pulls one block of the student towards several of the teacher", stacklevel=2
        )
    return sorted(pairs)
