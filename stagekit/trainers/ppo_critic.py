"""PPO's value models: one of its own, or a linear layer on the policy's last hidden states.

Legend: B completions, P tokens of the longest prompt, T of the longest completion. The value of a token is that of the
state it was chosen in, so it is read off the token before: positions P-1 .. P+T-2.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from trl.trainer.utils import disable_dropout_in_model

from stagekit.errors import StageError
from stagekit.models import adapter_base
from stagekit.reward_models import load_reward_model
from stagekit.trainers.rollouts import count_positions_from_the_first_token


VALUE_MODEL = "value_model"
"""Folder of a checkpoint that holds the value model."""


class SeparateCritic(nn.Module):
    """A backbone and a linear layer that gives one number per token.

    Args:
        backbone: A model that gives `last_hidden_state`.
        score: Linear layer from its hidden size to 1.
    """

    needs_policy = False

    def __init__(self, backbone: Any, score: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.score = backbone, score

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> torch.Tensor:
        """The values of the completion's tokens.

        Args:
            input_ids: (B, P+T), padded on the left before prompts and on the right after completions.
            attention_mask: (B, P+T)
            completion_length: T

        Returns:
            (B, T) in float32.
        """
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return _values(self.score, out.last_hidden_state[:, -completion_length - 1 : -1])


class HeadCritic(nn.Module):
    """A linear layer on the policy's backbone: no second model, and no second forward pass.

    Args:
        policy: The policy, an adapter's included. It is listened to, not held.
        score: Linear layer from its hidden size to 1.
    """

    needs_policy = True

    def __init__(self, policy: Any, score: nn.Linear) -> None:
        super().__init__()
        self.score = score
        self._heard: list[torch.Tensor] | None = None
        _backbone(policy).register_forward_hook(self._hear)

    @contextmanager
    def listening(self) -> Iterator[list[torch.Tensor]]:
        """While it lasts, the values (B, P+T) of every forward pass of the policy are added to the list."""
        heard: list[torch.Tensor] = []
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = None

    def _hear(self, module: Any, args: Any, output: Any) -> None:
        if self._heard is not None:
            self._heard.append(_values(self.score, output.last_hidden_state))


Critic = SeparateCritic | HeadCritic


def separate_critic(source: str | Path, *, dtype: torch.dtype, seed: int, policy: Any = None) -> SeparateCritic:
    """A value model that starts from a reward model, its head included, or from a language model with a new head.

    Args:
        source: Folder or hub id; of a reward model, an adapter is merged.
        dtype: Of the backbone.
        seed: Of a new head.
        policy: A live model of the same architecture whose weights the backbone takes instead of those in `source`.

    Raises:
        StageError: `source` cannot be loaded.
    """
    if _is_reward_model(source):
        reward = load_reward_model(str(source), dtype=dtype).model
        backbone, weight = reward.base_model, reward.get_submodule("score").weight
        score = new_head(weight.size(1), seed)
        with torch.no_grad():
            score.weight.copy_(weight)
    else:
        with torch.random.fork_rng():
            backbone = _load_backbone(source, dtype)
        if policy is not None:
            backbone.load_state_dict(_backbone(policy).state_dict())
        score = new_head(backbone.config.get_text_config().hidden_size, seed)
    count_positions_from_the_first_token(backbone)
    critic = SeparateCritic(backbone, score)
    critic.requires_grad_(True)
    disable_dropout_in_model(critic)
    return critic


def head_critic(policy: Any, seed: int) -> HeadCritic:
    """A new head on a policy."""
    return HeadCritic(policy, new_head(policy.config.get_text_config().hidden_size, seed))


def new_head(hidden_size: int, seed: int) -> nn.Linear:
    """A linear layer to one number, in float32, with weights of standard deviation 1/sqrt(d + 1) and bias 0.

    The same on every process, and drawn without touching the random state that sampling uses.

    Source: huggingface.co/papers/2009.01325, appendix B.1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        score = nn.Linear(hidden_size, 1)
    with torch.no_grad():
        score.weight.normal_(std=1 / math.sqrt(hidden_size + 1), generator=generator)
        score.bias.zero_()
    return score


def save_critic(critic: Critic, checkpoint: Path) -> None:
    """Write the weights into the folder `value_model` of a checkpoint."""
    folder = checkpoint / VALUE_MODEL
    folder.mkdir(exist_ok=True)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in critic.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def load_critic(critic: Critic, checkpoint: Path) -> None:
    """Take the weights of a checkpoint.

    Raises:
        StageError: it holds none.
    """
    file = checkpoint / VALUE_MODEL / "model.safetensors"
    if not file.is_file():
        raise StageError(f"{checkpoint} has no {VALUE_MODEL}/, so it was not written by PPO; start again")
    critic.load_state_dict(load_file(file))


def _backbone(policy: Any) -> Any:
    inner = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    return inner.base_model


def _values(score: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """(B, T) in float32 also under autocast: values are small differences."""
    with torch.autocast(hidden.device.type, enabled=False):
        values: torch.Tensor = score(hidden.to(score.weight.dtype))[..., 0]
    return values


def _load_backbone(source: str | Path, dtype: torch.dtype) -> Any:
    try:
        return AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StageError(f"{source} could not be loaded as a value model: {error}") from error


def _is_reward_model(source: str | Path) -> bool:
    if adapter_base(str(source)) is not None:
        return True
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StageError(f"{source} could not be loaded as a value model: {error}") from error
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
