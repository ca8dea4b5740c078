"""What PPO logs beside GRPO's numbers. Legend as in `stagekit.trainers.ppo_losses`; means are over all processes.

Watch: `objective/kl` well below 0 says that what samples is not what scores; `value/explained_variance` below 0 after
some ten rollouts, that the value model does not follow; `value/clip_frac` above 0.4, that `value_clip_range` is small
for the size of the rewards; `policy/ratio_max_dev` above 0 in the first step of a rollout, that something is random.
`Watch` says the first three once each.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stagekit.trainers.ppo_losses import explained_variance, masked_mean, value_clipped


logger = logging.getLogger(__name__)

_SHOWS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "objective/kl": (
        lambda value: value < -0.1,
        "the KL from the reference is negative: what samples is not what scores (top_k, another temperature, dropout)",
    ),
    "value/explained_variance": (
        lambda value: value < 0,
        "the value model explains nothing: raise critic_learning_rate or vf_coef, or set value_clip_range to None",
    ),
    "value/clip_frac": (
        lambda value: value > 0.4,
        "most values are clipped: value_clip_range is small for rewards of this size; raise it, or set it to None",
    ),
}
_IN_A_ROW, _SETTLED = 5, 10
"""How many numbers in a row show it, and after how many rollouts the value model should follow."""


class Watch:
    """Warns, once each, of numbers that say again and again that PPO is not learning what it should."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[bool]] = {name: deque(maxlen=_IN_A_ROW) for name in _SHOWS}
        self._rollouts = 0
        self._told: set[str] = set()

    def look(self, numbers: dict[str, float]) -> None:
        """Take the numbers of a rollout or a micro-batch."""
        self._rollouts += "objective/kl" in numbers
        for name, (shows, message) in _SHOWS.items():
            if name not in numbers or name in self._told:
                continue
            early = name.startswith("value/") and self._rollouts <= _SETTLED
            self._seen[name].append(not early and shows(numbers[name]))
            if sum(self._seen[name]) == _IN_A_ROW:
                self._told.add(name)
                logger.warning("%s = %.3g: %s", name, numbers[name], message)


def log_rollout(
    trainer: Any,
    scores: torch.Tensor,
    kl: torch.Tensor,
    rewards: torch.Tensor,
    ended: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    """What a rollout came to: scores (B,), KL per completion and per token, the reward that is learned from, and the
    share of completions that end by themselves (B,)."""
    mean = _mean_of(trainer)
    _add(
        trainer,
        {
            "objective/score": mean(scores),
            "objective/kl": mean((kl * mask).sum(dim=1)),
            "objective/kl_per_token": float(masked_mean(kl, mask, trainer.summed)),
            "objective/rlhf_reward": mean(rewards.sum(dim=1)),
            "objective/no_eos_frac": mean(1 - ended),
        },
    )
    store = trainer._metrics[_mode(trainer)]
    store.pop("frac_reward_zero_std", None)  # of groups, which are of one completion


def log_values(trainer: Any, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> None:
    """How good the value model was before it saw the rollout."""
    _add(
        trainer,
        {
            "value/mean": float(masked_mean(values, mask, trainer.summed)),
            "value/return_mean": float(masked_mean(returns, mask, trainer.summed)),
            "value/explained_variance": float(explained_variance(values, returns, mask, trainer.summed)),
        },
    )


def log_losses(
    trainer: Any,
    logps: torch.Tensor,
    values: torch.Tensor,
    losses: torch.Tensor,
    inputs: dict[str, Any],
    mask: torch.Tensor,
) -> float:
    """What a micro-batch came to. Returns the approximate KL per token from the policy that sampled (k3)."""
    log_ratio = (logps - inputs["old_per_token_logps"]) * mask
    approx_kl = float(masked_mean(torch.expm1(log_ratio) - log_ratio, mask, trainer.summed))
    largest = trainer.accelerator.gather(torch.expm1(log_ratio).abs().max()).max()
    clipped = value_clipped(values, inputs["values"], inputs["returns"], trainer.args.value_clip_range)
    _add(
        trainer,
        {
            "policy/approx_kl": approx_kl,
            "policy/ratio_max_dev": float(largest),
            "value/loss": float(masked_mean(losses, mask, trainer.summed)),
            "value/clip_frac": float(masked_mean(clipped, mask, trainer.summed)),
        },
    )
    return approx_kl


def show_advantages(trainer: Any, advantages: torch.Tensor, mask: torch.Tensor) -> None:
    """Put the mean advantage of each completion into the table of completions; GRPO's are of groups."""
    means = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    shown = trainer.accelerator.gather(means).tolist()
    table = trainer._logs["advantages"]
    for _ in range(min(len(shown), len(table))):
        table.pop()
    table.extend(shown)


def _mean_of(trainer: Any) -> Any:
    def mean(x: torch.Tensor) -> float:
        return float(trainer.accelerator.gather(x).mean())

    return mean


def _mode(trainer: Any) -> str:
    return "train" if trainer.model.training else "eval"


def _add(trainer: Any, values: dict[str, float]) -> None:
    for name, value in values.items():
        trainer._metrics[_mode(trainer)][name].append(value)
    if trainer.model.training:
        trainer.watch.look(values)
