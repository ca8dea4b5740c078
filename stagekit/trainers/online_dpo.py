"""DPO on what the policy says now: two completions of each prompt are sampled, scored and compared.

Sampling, rewards, vLLM and logging are those of TRL's `GRPOTrainer`, with groups of two; the loss is DPO's.

Legend: B pairs of a process's rollout or micro-batch, P tokens of the longest prompt, T of the longest completion. A
batch holds tensors (B, 2, ...), so that pairs stay together when a rollout is shuffled and cut.
"""

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from trl import GRPOConfig, GRPOTrainer

from stagekit.errors import ConfigError, Problem
from stagekit.losses import soft_label_dpo_loss
from stagekit.rewards import as_reward
from stagekit.trainers.rollouts import Rollouts


_OTHER_OBJECTIVE = (
    "loss_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation", "epsilon",
    "epsilon_high", "delta", "off_policy_mask_threshold", "use_bias_correction_kl", "top_entropy_quantile",
    "entropy_coef", "use_adaptive_entropy", "mask_truncated_completions",
)  # fmt: skip


@dataclass
class OnlineDPOConfig(GRPOConfig):  # type: ignore[misc]
    """Arguments of `OnlineDPOTrainer`: those of `trl.GRPOConfig` but for its objective, and its own.

    Args:
        num_generations: Always 2.
        beta: Strength of the tie to the reference.
        disable_dropout: Off, so that the policy that learns is the one that sampled.
        preference_scale: s in P(one is better) = sigma((score - other score) / s). None: the one with the higher score
            is better, and a tie teaches nothing.
        missing_eos_penalty: Taken off the score of a completion that does not end with EOS.

    Raises:
        ConfigError: arguments of GRPO's objective, or numbers out of their range.
    """

    num_generations: int | None = 2
    beta: float = 0.1
    disable_dropout: bool = True
    preference_scale: float | None = None
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        """Check what GRPO checks, then what is no part of DPO."""
        super().__post_init__()
        defaults = {field.name: field.default for field in fields(GRPOConfig) if field.default is not MISSING}
        problems = [
            Problem(name, f"{getattr(self, name)!r} has no effect in online DPO; leave it out")
            for name in _OTHER_OBJECTIVE
            if getattr(self, name) != defaults[name]
        ]
        if self.num_generations != 2:
            problems.append(Problem("num_generations", f"{self.num_generations!r}: online DPO compares two"))
        if not self.beta > 0:
            problems.append(Problem("beta", f"{self.beta!r} is not above 0"))
        if self.preference_scale is not None and not self.preference_scale > 0:
            problems.append(
                Problem("preference_scale", f"{self.preference_scale!r} is not above 0; None has no scale")
            )
        if problems:
            raise ConfigError(problems)


class OnlineDPOTrainer(Rollouts, GRPOTrainer):  # type: ignore[misc]
    """Online DPO: -p log sigma(x) - (1 - p) log sigma(-x), with x = beta * (log-ratio of one completion - that of the
    other) and p the probability that the one is better, by their scores.

    With a `preference_scale` s the loss is least where the policy is the reference times exp(score / (beta s)),
    whatever is sampled; without one, each pair is pushed apart. Batch sizes count completions, so they are even.

    Args:
        model: As in `GRPOTrainer`.
        reward_funcs: Functions as in `GRPOTrainer`, or outcome reward models, as objects or by name; one or a list.
        args: An `OnlineDPOConfig`.
        arguments: Everything else that `GRPOTrainer` takes, and `chunk_size` and `order_seed` of `Rollouts`.

    Raises:
        ConfigError: a micro-batch that cuts a pair.

    Source: huggingface.co/papers/2402.04792; the probabilities are those of huggingface.co/papers/2305.18290.
    """

    _name: ClassVar = "Online DPO"
    _tag_names: ClassVar = ["trl", "online-dpo"]
    _paper: ClassVar = {
        "title": "Direct Language Model Alignment from Online AI Feedback", "id": "2402.04792", "citation": "",
    }  # fmt: skip

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: OnlineDPOConfig | None = None, **arguments: Any
    ) -> None:
        args = OnlineDPOConfig("online-dpo") if args is None else args
        if args.per_device_train_batch_size % 2:
            raise ConfigError(
                f"per_device_train_batch_size: {args.per_device_train_batch_size} completions cut a pair; make it even"
            )
        if args.num_generations_eval is None:
            args.num_generations_eval = 2
        sources = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._scores = torch.empty(0)
        super().__init__(model, reward_funcs=[as_reward(source) for source in sources], args=args, **arguments)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._calculate_rewards(*args, **kwargs)
        self._scores = found
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        start = self.accelerator.process_index * len(inputs)
        own = self._scores[start : start + len(inputs)] * self.reward_weights.to(self._scores.device)
        scores = torch.where(own.isnan().all(dim=1), torch.nan, own.nansum(dim=1))
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * self._unended(output["completion_ids"], mask)
        first, second = scores.view(-1, 2).unbind(dim=1)
        chances, decided = preference(first, second, self.args.preference_scale)
        count = self.accelerator.gather(decided.sum()).sum()
        pairs = {
            name: output[name].view(len(decided), 2, -1)
            for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "ref_per_token_logps")
        }
        store = self._metrics["train" if self.model.training else "eval"]
        store.pop("frac_reward_zero_std", None)
        store["pairs/decided"].append(float(self.accelerator.gather(decided).mean()))
        store["pairs/score_difference"].append(float(self.accelerator.gather((first - second).abs()).nanmean()))
        return {**pairs, "chances": chances, "decided": decided, "num_items_in_batch": count}

    def _unended(self, completion_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(2B,) 1 where the last token of the completion does not end it."""
        last = completion_ids.gather(1, (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0))[:, 0]
        return 1.0 - torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device)).float()

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        flat = {name: value.flatten(0, 1) for name, value in inputs.items() if value.dim() == 3}
        mask = flat["completion_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([flat["prompt_ids"], flat["completion_ids"]], dim=1),
            torch.cat([flat["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
        )
        ratios = ((logps - flat["ref_per_token_logps"]) * mask).sum(dim=1).view(-1, 2)
        delta = ratios[:, 0] - ratios[:, 1]
        losses = soft_label_dpo_loss(delta, self.beta, inputs["chances"]) * inputs["decided"]
        self._log_pairs(ratios.detach(), inputs, entropies.detach(), mask)
        loss: torch.Tensor = losses.sum() / self._normaliser(inputs)
        return loss

    def _normaliser(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The decided pairs of a minibatch, so that the loss is a mean over it whatever its parts."""
        pairs: torch.Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            pairs = pairs * (self.current_gradient_accumulation_steps / self.args.steps_per_generation)
        return pairs

    def _log_pairs(
        self, ratios: torch.Tensor, inputs: dict[str, Any], entropies: torch.Tensor, mask: torch.Tensor
    ) -> None:
        gather, store = self.accelerator.gather, self._metrics["train" if self.model.training else "eval"]
        better = (inputs["chances"] >= 0.5).long()  # the index of the worse one
        chosen = self.beta * ratios.gather(1, 1 - better[:, None])[:, 0]
        rejected = self.beta * ratios.gather(1, better[:, None])[:, 0]
        known = gather(inputs["decided"]).bool()
        if known.any():
            values = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
            values["accuracies"] = (chosen > rejected).float()
            for name, value in values.items():
                store[f"rewards/{name}"].append(float(gather(value)[known].mean()))
        store["kl"].append(float(gather(ratios).mean()))
        sums = self.accelerator.reduce(torch.stack([(entropies * mask).sum(), mask.sum().float()]), reduction="sum")
        store["entropy"].append(float(sums[0] / sums[1].clamp(min=1.0)))


def preference(first: torch.Tensor, second: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """How likely the first of two is better, and which pairs say anything.

    Args:
        first: (B,) scores; NaN where there is none.
        second: (B,) scores of the others.
        scale: s in sigma((first - second) / s). None: 1 or 0.

    Returns:
        (B,) probabilities, and (B,) 1 where both have a score and, without a scale, not the same one; else 0.
    """
    known = ~(first.isnan() | second.isnan())
    difference = torch.where(known, first - second, 0.0)
    if scale is not None:
        return torch.sigmoid(difference / scale), known.float()
    return (difference > 0).float(), (known & (difference != 0)).float()
