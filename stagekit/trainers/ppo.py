"""Proximal policy optimisation with a value model, as a small subclass of TRL's `GRPOTrainer`.

TRL removed its own PPO in 1.13. Sampling, rewards, the clipped surrogate, the entropy bonus, vLLM and logging are
GRPO's; what is here is a value model, the KL in the reward, and generalised advantage estimation.

Legend: B completions of a process's rollout or micro-batch, P tokens of the longest prompt, T of the longest
completion.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftModel
from trl import GRPOTrainer

from stagekit.errors import ConfigError, StageError
from stagekit.rewards import as_reward
from stagekit.trainers.logit_tiles import logit_tiles, tokens_at_once
from stagekit.trainers.ppo_config import PPOConfig
from stagekit.trainers.ppo_critic import HeadCritic, head_critic, load_critic, save_critic, separate_critic
from stagekit.trainers.ppo_losses import gae, kl_estimate, last_token, token_rewards, value_loss, whiten
from stagekit.trainers.ppo_metrics import Watch, log_losses, log_rollout, log_values, show_advantages
from stagekit.trainers.rollouts import Rollouts


__all__ = ["PPOConfig", "PPOTrainer"]

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """What one forward pass of the policy gave, (B, T) each; values where the value model is a head on it."""

    logps: torch.Tensor
    values: torch.Tensor | None


@dataclass
class KLStop:
    """Whether the rest of a rollout is left out, and the approximate KL of each part of the step under way."""

    stopped: bool = False
    seen: list[float] = field(default_factory=list)

    def decide(self, target: float | None) -> None:
        """Stop where the mean of the step is above the target, if there is one."""
        self.stopped = target is not None and sum(self.seen) / len(self.seen) > target
        self.seen.clear()


class PPOTrainer(Rollouts, GRPOTrainer):  # type: ignore[misc]
    """PPO with generalised advantage estimation and a value model.

    A completion's reward is its score at the last token minus `beta` times a KL estimate at every token. Values and
    advantages are per token; tokens of tools and padding have none. A checkpoint's `value_model/` holds the value
    model, `save_model` writes the policy alone.

    Args:
        model: As in `GRPOTrainer`.
        reward_funcs: Functions as in `GRPOTrainer`, or outcome reward models, as objects or by name; one or a list.
        args: A `PPOConfig`.
        train_dataset: Rows with `prompt`; further columns are handed to the reward functions.
        critic_model: Folder or hub id that a separate value model starts from; of a reward model its head is taken
            too. None: the policy.
        arguments: Everything else that `GRPOTrainer` takes, and `chunk_size` and `order_seed` of `Rollouts`.

    Raises:
        ConfigError: arguments that contradict each other, or a mode of distributed training that would split the
            value model wrongly.

    Source: huggingface.co/papers/1707.06347; for language models huggingface.co/papers/2203.02155.
    """

    _name: ClassVar = "PPO"
    _tag_names: ClassVar = ["trl", "ppo"]
    _paper: ClassVar = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347", "citation": ""}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        *,
        critic_model: str | Path | None = None,
        **arguments: Any,
    ) -> None:
        args = PPOConfig("ppo") if args is None else args
        if args.generation_batch_size is None:
            args.set_rollout(_rollout_of(args, train_dataset))
            logger.info("a rollout is %d completions", args.generation_batch_size)
        self._scores = torch.empty(0)
        self._scored: list[Scored] = []
        self._over = KLStop()
        self.watch = Watch()
        self._buffered_inputs: list[dict[str, Any]] | None = None
        arguments.setdefault("chunk_size", args.rollout_chunk_size)
        super().__init__(
            model,
            reward_funcs=_rewards(reward_funcs, arguments.pop("reward_processing_classes", None)),
            args=args,
            train_dataset=train_dataset,
            **arguments,
        )
        if self._is_vlm:
            raise ConfigError("PPO trains text models; a processor of images was given")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError("PPO: the value model is not sharded with the policy; use DDP, not FSDP or DeepSpeed")
        self.critic = self._make_critic(model, critic_model).to(self.accelerator.device)
        self._critic_stepped = True

    def _make_critic(self, given: Any, source: str | Path | None) -> Any:
        args, policy = self.args, self.model
        adapter = isinstance(policy, PeftModel)
        kind = args.critic if args.critic != "auto" else ("head" if adapter else "separate")
        if kind == "head":
            if source is not None:
                raise ConfigError(
                    "critic_model: a head on the policy's backbone starts from none; use critic='separate'"
                )
            return head_critic(policy, args.seed)
        live = policy if source is None and not isinstance(given, str) and not adapter else None
        start = source if source is not None else policy.config._name_or_path
        dtype = policy.dtype if policy.dtype.is_floating_point else torch.float32
        critic = separate_critic(start, dtype=dtype, seed=args.seed, policy=live)
        if args.activation_checkpointing:
            critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        return critic

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        critic = self.critic
        listening = critic.listening() if isinstance(critic, HeadCritic) else _silence()
        with listening as heard, logit_tiles(self._tokens_at_once()):
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        length = found[0].size(1)
        values = torch.cat([each[:, -length - 1 : -1] for each in heard]) if heard else None
        self._scored.append(Scored(found[0], values))
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._calculate_rewards(*args, **kwargs)
        self._scores = found
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._scored = []
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = _mask_of(output)
        if "old_per_token_logps" in output:
            before = self._scored[0]
            values = before.values if before.values is not None else self._values_of(output)
        else:
            before = self._score_again(output)
            values = before.values if before.values is not None else self._values_of(output)
            output["old_per_token_logps"] = before.logps
        logps = output["old_per_token_logps"]
        references = output.pop("ref_per_token_logps", None)
        kl = kl_estimate(logps, references, self.args.kl_estimator) if references is not None else logps * 0
        scores = self._own_scores(inputs)
        ended = self._ended(output["completion_ids"], mask)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (1 - ended)
        rewards = token_rewards(scores, self.args.beta * kl, mask)
        log_rollout(self, scores, kl, rewards, ended, mask)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self.summed)
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.gae_lambda)
        log_values(self, values, returns, mask)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=self.summed)
        show_advantages(self, advantages, mask)
        return {**output, "advantages": advantages, "values": values, "returns": returns}

    @torch.no_grad()
    def _score_again(self, batch: dict[str, Any]) -> Scored:
        """Log-probs of the rollout, and values where the policy gives them; TRL leaves them out where the rollout is
        used for a single step."""
        self._scored = []
        ids, attention = _whole(batch)
        length, size = batch["completion_ids"].size(1), self._forward_size()
        self._get_per_token_logps_and_entropies(self.model, ids, attention, length, batch_size=size)
        return self._scored[0]

    @torch.no_grad()
    def _values_of(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, T) values of the rollout by a separate value model, in parts."""
        ids, attention = _whole(batch)
        length, size = batch["completion_ids"].size(1), self._forward_size()
        with self.accelerator.autocast():
            parts = [
                self.critic(ids[start : start + size], attention[start : start + size], length)
                for start in range(0, len(ids), size)
            ]
        return torch.cat(parts)

    def _tokens_at_once(self) -> int:
        return tokens_at_once(self.args.logit_chunk_size, self.accelerator.device)

    def _forward_size(self) -> int:
        training = self.model.training
        return int(self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size)

    def _own_scores(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        """(B,) the weighted sum of the rewards of this process's completions.

        Raises:
            StageError: no reward function has anything to say about one.
        """
        weights = self.reward_weights.to(self._scores.device)
        start = self.accelerator.process_index * len(inputs)
        own = self._scores[start : start + len(inputs)]
        silent = own.isnan().all(dim=1)
        if silent.any():
            row = int(silent.nonzero()[0])
            raise StageError(f"no reward function scores a completion of this prompt: {inputs[row]['prompt']!r}")
        scores: torch.Tensor = (own * weights).nansum(dim=1)
        return scores

    def _ended(self, completion_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B,) 1 where the last token of the completion ends it."""
        eos = torch.isin(completion_ids, torch.tensor(self.eos_token_ids, device=completion_ids.device))
        return (eos * last_token(mask)).sum(dim=1)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor summed over all processes."""
        total: torch.Tensor = self.accelerator.reduce(x, reduction="sum")
        return total

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        passes = self.args.steps_per_generation
        starts_pass = self._step % passes == 0 and self._step % (passes * self.num_iterations) != 0
        if self.model.training and self.args.reshuffle and starts_pass and self._buffered_inputs is not None:
            self._buffered_inputs = reshuffled(self._buffered_inputs)
        return super()._prepare_inputs(generation_batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._scored = []
        with self._kl_not_in_loss():
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        now, mask = self._scored[0], _mask_of(inputs)
        values = now.values
        if values is None:
            with self.accelerator.autocast():
                values = self.critic(*_whole(inputs), inputs["completion_ids"].size(1))
        clip = self.args.value_clip_range
        losses = value_loss(values, inputs["values"], inputs["returns"], clip)
        self._scored = []
        moved = log_losses(self, now.logps.detach(), values.detach(), losses.detach(), inputs, mask)
        if self.model.training:
            self._over.seen.append(moved)
        loss += self.args.vf_coef * (losses * mask).sum() / self._normaliser(inputs)
        return loss

    @contextmanager
    def _kl_not_in_loss(self) -> Iterator[None]:
        """GRPO would add the KL to the loss; here it is in the reward already."""
        beta, self.beta = self.args.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta

    def _normaliser(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What GRPO's dapo loss divides by, so that both losses depend on the minibatch and not on its parts."""
        tokens: torch.Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens *= self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; none where the policy has moved by `target_kl` and waits for the next rollout."""
        if self._critic_stepped:  # the training loop empties the gradients of `model` alone
            self.critic.zero_grad()
        self._critic_stepped = bool(self.accelerator.sync_gradients)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._over = KLStop()
        if self._critic_stepped and self.args.target_kl is not None:
            self._metrics["train"]["policy/skipped_frac"].append(float(self._over.stopped))
        if self._over.stopped:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        with logit_tiles(self._tokens_at_once()):  # the backward pass makes the logits again
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._critic_stepped:
            self._average_critic_gradients()
            self._over.decide(self.args.target_kl)
        return loss

    def _average_critic_gradients(self) -> None:
        """What DistributedDataParallel does for the policy; the value model is outside of it."""
        if self.accelerator.num_processes > 1:
            for parameter in self.critic.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def create_optimizer(self, model: Any = None) -> Any:
        """The policy's optimiser, with the value model in groups of its own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made:
            rate = self.args.critic_learning_rate
            decayed = set(self.get_decay_parameter_names(self.critic))
            for decays in (True, False):
                chosen = [weight for name, weight in self.critic.named_parameters() if (name in decayed) == decays]
                group: dict[str, Any] = {"params": chosen, "weight_decay": self.args.weight_decay if decays else 0.0}
                if rate is not None:
                    group["lr"] = rate
                if chosen:
                    optimizer.add_param_group(group)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip both models, each to `max_grad_norm`; the norm that is returned is the policy's."""
        norm = super()._clip_grad_norm(model)
        own = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm)
        self._metrics["train"]["value/grad_norm"].append(float(own))
        return norm

    def _rollout_state(self) -> dict[str, Any]:
        return {**super()._rollout_state(), "stopped": self._over.stopped}

    def _take_up(self, state: Mapping[str, Any], folder: Path) -> None:
        super()._take_up(state, folder)
        self._over = KLStop(stopped=state["stopped"])

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.is_world_process_zero():
            save_critic(self.critic, Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        load_critic(self.critic, Path(resume_from_checkpoint))


@contextmanager
def _silence() -> Iterator[list[torch.Tensor]]:
    yield []


def reshuffled(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same completions in other micro-batches; what is of the whole rollout stays."""
    size = batches[0]["advantages"].size(0)
    order = torch.randperm(size * len(batches))
    mixed = {
        name: value if value.dim() == 0 else torch.cat([batch[name] for batch in batches])[order.to(value.device)]
        for name, value in batches[0].items()
    }
    return [
        {name: value if value.dim() == 0 else value[start : start + size] for name, value in mixed.items()}
        for start in range(0, len(order), size)
    ]


def _rewards(sources: Any, tokenizers: Any) -> list[Any]:
    """The reward functions, watched."""
    sources = [] if sources is None else sources if isinstance(sources, list) else [sources]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(sources)
    return [as_reward(source, tokenizer) for source, tokenizer in zip(sources, tokenizers, strict=True)]


def _rollout_of(args: PPOConfig, dataset: Any) -> int:
    if not hasattr(dataset, "__len__"):
        raise ConfigError("generation_batch_size: streamed data do not say how large a rollout can be; give it")
    return args.rollout_for(len(dataset))


def _mask_of(batch: Mapping[str, Any]) -> torch.Tensor:
    """(B, T) 1 where the policy chose the token."""
    mask: torch.Tensor = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).float()


def _whole(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention (B, P+T) of prompts with their completions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
