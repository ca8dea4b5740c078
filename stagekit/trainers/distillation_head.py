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
        return self.finished(self.product(hidden))

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) in the weights' dtype or that of autocast: the one product of matrices."""
        hidden = hidden.to(self.weight.device, self.weight.dtype)
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def finished(self, product: torch.Tensor) -> torch.Tensor:
        """(N, V) float32, scaled and capped."""
        logits = product.float()
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

    The first four are (B, T-1), without gradient, and 0 where nothing is predicted.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    soft: torch.Tensor | None = None
    """The divergence of every token from the teacher, without T^2."""
    label_mask: torch.Tensor | None = None
    objective: torch.Tensor | None = None
    """soft_weight * soft - hard_weight * log_probs, summed over the tokens: what the gradient is of."""
    hidden: torch.Tensor | None = None
    """The mean distance of the mapped hidden states, summed over the tokens; it has a gradient too."""


Soft = Callable[[torch.Tensor, slice], torch.Tensor]
"""(logits (n, V) of some tokens of a chunk, which of the chunk they are) -> (n,) divergences from the teacher."""

BLOCKS = 8
"""In how many parts a chunk's logits are worked on, so that what is made of them on the way is small."""


@dataclass(frozen=True)
class Lesson:
    """What the student is taught on one batch, handed to its forward."""

    ask: Callable[[slice], "Soft"]
    """(which of the N tokens) -> what their divergences are measured with."""
    soft_weight: float
    hard_weight: float
    hidden: Callable[[list[torch.Tensor]], torch.Tensor] | None
    """(hidden states (N, H) of the student's blocks in `layers`) -> the summed distance."""
    layers: tuple[int, ...]
    chunk_tokens: int


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """(N,) where, in (B, T) made flat, the tokens stand that predict a label: each before it, in the same row."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask.flatten().nonzero()[:, 0]


def at_places(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(N, H) of states (B, T, H)."""
    return states.flatten(0, 1).index_select(0, places.to(states.device))


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
        labels = kwargs.pop("labels")
        kwargs["output_hidden_states"] = lesson.hidden is not None  # peft passes one on, set or not
        out = self.base_model(*args, **kwargs)
        places, mask, head = predicting(labels), labels[:, 1:] != -100, head_of(self)
        last = at_places(out.last_hidden_state, places).to(head.weight.device, head.weight.dtype)
        answers = labels[:, 1:][mask].to(last.device)
        objective, *tokens = _Objective.apply(  # type: ignore[no-untyped-call]
            last, head.weight, head.bias, answers, head, lesson, torch.is_grad_enabled()
        )
        states = [at_places(out.hidden_states[layer + 1], places) for layer in lesson.layers]
        return DistilledOutput(
            *(
                one.new_zeros(mask.shape, device=mask.device).masked_scatter(mask, one.to(mask.device))
                for one in tokens
            ),
            label_mask=mask,
            objective=objective,
            hidden=lesson.hidden(states) if lesson.hidden is not None else None,
        )

    model.forward = types.MethodType(forward, model)


class _Objective(torch.autograd.Function):
    """The objective () and, of every token (N,), log-probability of the label, entropy, whether the label is the
    likeliest, and divergence; only the objective has a gradient.

    The gradient is made along with it, while a chunk's logits are there, and scaled in the backward pass. So the
    logits of the student and of the teacher are made once; a chunk that is made again in the backward pass would make
    both twice. What is kept is as large as what it is the gradient of.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
        head: Head, lesson: Lesson, differentiable: bool,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """hidden (N, H) and labels (N,) of the tokens that predict one; weight and bias those of the head."""
        of_hidden, of_weight, of_bias = (
            torch.zeros(one.shape, dtype=torch.float32, device=one.device)
            if one is not None and needed and differentiable
            else None
            for one, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        objective, done = hidden.new_zeros((), dtype=torch.float32), []
        for start in range(0, max(len(labels), 1), lesson.chunk_tokens):
            rows = slice(start, min(start + lesson.chunk_tokens, len(labels)))
            values, slope = _chunk(hidden[rows], labels[rows], head, lesson.ask(rows), lesson, differentiable)
            done.append(values)
            log_probs, *_, soft = values
            objective = objective + (lesson.soft_weight * soft - lesson.hard_weight * log_probs).sum()
            if of_hidden is not None:
                of_hidden[rows] = slope @ weight
            if of_weight is not None:
                _add_product(of_weight, slope.t(), hidden[rows])
            if of_bias is not None:
                of_bias += slope.sum(dim=0, dtype=torch.float32)
        gradients = (of_hidden, of_weight, of_bias)
        ctx.save_for_backward(*(None if one is None else one.to(weight.dtype) for one in gradients))
        tokens = tuple(torch.cat(parts) for parts in zip(*done, strict=True))
        ctx.mark_non_differentiable(*tokens)
        return (objective, *tokens)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        """In place, since a copy of the head's gradient would be the largest thing there."""
        return (*(None if one is None else one.mul_(upstream) for one in ctx.saved_tensors), None, None, None, None)


def _chunk(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, soft: Soft, lesson: Lesson, differentiable: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Of n tokens: log-probability, entropy, likeliest, divergence, (n,) each; and the objective's gradient with
    respect to the head's product, (n, V), which takes the product's place if it is wanted."""
    product, found = head.product(hidden), []
    # An accelerator waits for the many small kernels of a block longer than a block's memory is worth.
    size = max(1, -(-len(labels) // (BLOCKS if product.device.type == "cpu" else 1)))
    for start in range(0, max(len(labels), 1), size):
        block = slice(start, min(start + size, len(labels)))
        given = product[block].requires_grad_(differentiable)
        values, slope = _block(given, labels[block], head, lambda logits: soft(logits, block), lesson)  # noqa: B023
        found.append(values)
        if slope is not None:
            product[block] = slope
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True)), product


def _block(
    product: torch.Tensor, labels: torch.Tensor, head: Head, soft: Callable[[torch.Tensor], torch.Tensor],
    lesson: Lesson,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:  # fmt: skip
    """The same of a part of a chunk, with the gradient beside it; None where the product wants none."""
    differentiable = product.requires_grad
    with torch.set_grad_enabled(differentiable):
        logits = head.finished(product)
        divergences = soft(logits)
    slope = None
    if differentiable:
        weights = torch.full_like(divergences, lesson.soft_weight)
        (slope,) = torch.autograd.grad(divergences, logits, weights, retain_graph=logits is not product)
    whole, divergences = logits.detach(), divergences.detach()
    mass = whole.logsumexp(dim=-1)
    chosen = labels[:, None]
    log_probs = whole.gather(-1, chosen)[:, 0] - mass
    chances = (whole - mass[:, None]).exp_()
    entropy = mass - torch.linalg.vecdot(chances, whole)
    is_top1 = (whole.argmax(dim=-1) == labels).to(log_probs.dtype)
    if slope is not None:
        slope.add_(chances, alpha=lesson.hard_weight)
        slope.scatter_add_(-1, chosen, torch.full_like(mass, -lesson.hard_weight)[:, None])
        if logits is not product:
            (slope,) = torch.autograd.grad(logits, product, slope)
    return (log_probs, entropy, is_top1, divergences), slope


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in float32; without the product beside it where the dtypes are that already."""
    if left.dtype == right.dtype == total.dtype and not torch.is_autocast_enabled(total.device.type):
        total.addmm_(left, right)
    else:
        total += left @ right
