"""A language model's head run in chunks, so that logits of a whole batch never exist, neither the student's nor the
teacher's.

Legend: B rows, T tokens of a row, N tokens of the batch that predict a label, V vocabulary, H hidden width.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from stagekit.errors import ConfigError


HEAD_TOLERANCE = 2e-2
"""Largest difference between our logits and the model's, relative to the largest logit: both are the same sums, in
bfloat16 rounded in another order."""


@dataclass(frozen=True)
class Head:
    """What makes logits of the last hidden states, as the architectures of transformers do it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) float32, of hidden states (N, H)."""
        hidden = hidden.to(self.weight.device, self.weight.dtype)
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: Any) -> Head:
    """The head of a causal language model, looked up anew: peft and FSDP replace weights."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    named = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in named if (value := getattr(config, name, None)) is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, 1.0 if scale is None else scale, softcap)


def base_of(model: Any) -> Any:
    """The causal language model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_head(model: Any, whose: str) -> None:
    """See that the head gives the logits that the model itself gives.

    Raises:
        ConfigError: an architecture whose logits are made in another way.
    """
    model = base_of(model)
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
        own = model(input_ids=ids, use_cache=False).logits.float()
        ours = head_of(model).logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        model.train(was_training)
    if not float((own - ours).abs().max()) <= HEAD_TOLERANCE * max(float(own.abs().max()), 1e-6):
        raise ConfigError(
            f"the {whose} is a {type(model).__name__}, whose logits are not its head's product with the last hidden "
            "states; distil from or into another architecture, or use mode: sequence"
        )


@dataclass
class DistilledOutput(ModelOutput):  # type: ignore[misc]
    """What TRL reads of a model with a fused head, and what the student lost against its teacher.

    All but the masks and `hidden` are (B, T-1) and 0 where nothing is predicted.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    soft: torch.Tensor | None = None
    """The divergence of every token from the teacher, without T^2."""
    hidden: torch.Tensor | None = None
    """The mean distance of the mapped hidden states, summed over the tokens."""


@dataclass(frozen=True)
class Lesson:
    """What the student is taught on one batch, handed to its forward."""

    soft: Callable[[torch.Tensor, slice], torch.Tensor]
    """(logits (n, V) of some of the tokens, which of the N they are) -> (n,) divergences."""
    hidden: Callable[[list[torch.Tensor]], torch.Tensor] | None
    """(hidden states (N, H) of the student's blocks in `layers`) -> the summed distance."""
    layers: tuple[int, ...]
    chunk_tokens: int


def add_distilling_head(model: Any) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True, lesson=lesson)` give a `DistilledOutput`.

    Without `lesson` the forward is the one before, that of TRL.
    """
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, lesson: Lesson | None = None, **kwargs: Any) -> Any:
        if lesson is None:
            return before(*args, **kwargs)
        kwargs.pop("fused_lm_head")
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["output_hidden_states"] = lesson.hidden is not None  # peft passes one on, set or not
        out = self.base_model(*args, **kwargs)
        mask = labels != -100  # (B, T-1): position t predicts label t+1
        states = [out.hidden_states[layer + 1][:, :-1][mask] for layer in lesson.layers]
        tokens = _tokens(out.last_hidden_state[:, :-1][mask], labels[mask], head_of(self), lesson)
        return DistilledOutput(
            *(value.new_zeros(mask.shape).masked_scatter(mask, value) for value in tokens[:3]),
            label_mask=mask,
            soft=tokens[3].new_zeros(mask.shape).masked_scatter(mask, tokens[3]),
            hidden=lesson.hidden(states) if lesson.hidden is not None else None,
        )

    model.forward = types.MethodType(forward, model)


def _tokens(hidden: torch.Tensor, labels: torch.Tensor, head: Head, lesson: Lesson) -> tuple[torch.Tensor, ...]:
    """Log-probability of the label, entropy, whether the label is the likeliest, divergence; (N,) each.

    The backward pass makes each chunk's logits once more instead of keeping them.
    """

    def chunk(hidden: torch.Tensor, labels: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        logits = head.logits(hidden)
        labels = labels.to(logits.device)
        mass = logits.logsumexp(dim=-1)
        log_probs = logits.gather(-1, labels[:, None])[:, 0] - mass
        with torch.no_grad():
            entropy = mass - ((logits - mass[:, None]).exp() * logits).sum(dim=-1)
            is_top1 = logits.argmax(dim=-1) == labels
        return log_probs, entropy, is_top1.to(log_probs.dtype), lesson.soft(logits, rows)

    done = []
    for start in range(0, max(len(labels), 1), lesson.chunk_tokens):
        rows = slice(start, min(start + lesson.chunk_tokens, len(labels)))
        given = (hidden[rows], labels[rows], rows)
        if torch.is_grad_enabled():
            done.append(checkpoint(chunk, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            done.append(chunk(*given))
    return tuple(torch.cat(parts).to(hidden.device) for parts in zip(*done, strict=True))
