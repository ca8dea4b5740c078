"""LAMB and LARS: optimisers whose step is a share of each tensor's own norm.

Our own, since those of bitsandbytes are something else: Adam and momentum with the step capped at a share of the norm,
which is 0 for a tensor of zeros, so that it never moves. Every LoRA adapter starts with one. Here the ratio of the
norms is 1 where the weights or the step have none.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """Adam's direction with decoupled decay, scaled to the norm of the weights.
    Source: huggingface.co/papers/1904.00962, algorithm 2, with bias correction and phi the identity.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step, for the tensors that have a gradient."""
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, state = weight.grad.float(), self.state[weight]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(gradient)
                    state["exp_avg_sq"] = torch.zeros_like(gradient)
                state["step"] += 1
                first = state["exp_avg"].lerp_(gradient, 1 - beta1)
                second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                update = (first / (1 - beta1 ** state["step"])).div_(root)
                update.add_(weight, alpha=group["weight_decay"])
                weight.add_(update * (_trust(weight, update) * -group["lr"]))


class Lars(torch.optim.Optimizer):
    """Momentum with coupled decay, where each tensor's rate is a share of the ratio of its norms.
    Source: huggingface.co/papers/1708.03888, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust_coefficient, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step, for the tensors that have a gradient."""
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, state = weight.grad.float(), self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                # |g| + decay |w|, not |g + decay w|: the paper's denominator
                size = gradient.norm() + group["weight_decay"] * weight.float().norm()
                update = gradient.add(weight, alpha=group["weight_decay"])
                update = update * (_trust(weight, size) * group["trust"] * group["lr"])
                weight.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(update))


def _trust(weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The norm of the weights over that of the step; 1 where either is 0."""
    above, below = weight.float().norm(), update.norm()
    return torch.where((above > 0) & (below > 0), above / below, torch.ones_like(above))
