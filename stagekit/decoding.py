"""The decode loop of text generation: prompts that are the same are read once, and rows that are finished leave.

Token by token it gives what `generate` of transformers gives: greedily the same tokens, and sampled, from the same
random state, the same draws. P different prompts, B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from stagekit.requests import Sampling


LEAVING = 8
"""Finished rows leave when they are one in so many: each leaving copies the cache once."""

SPARE_TOKENS = 64
"""Tokens by which the cache grows at a time, so that not every token copies it."""

OnToken = Callable[[int, int, int], None]


def can_decode(model: Any) -> bool:
    """Whether the loop can run the model: one that goes on from a cache of keys and values."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return not (base.config.is_encoder_decoder or getattr(base, "_is_stateful", False))


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    sampling: Sampling,
    eos: set[int],
    pad: int,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, EOS included where there is one.

    Equal prompts (the samples of one prompt) share one prefill. A row leaves the batch when it is finished, so the
    others do not wait for it. The model must be in evaluation mode, and the caller seeds torch.

    Args:
        prompts: token ids of each row's prompt.
        limits: most new tokens of each row.
        on_token: called after every token with the number of rows, of tokens so far and of tokens at most.
    """
    device = next(model.parameters()).device
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    places = {prompt: place for place, prompt in enumerate(distinct)}
    reader, most = _Reader(model), max(limits)
    cache, mask, logits = _prefill(reader, distinct, pad, device)
    width, positions = mask.shape[1], mask.sum(-1)
    shared = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
    if len(distinct) < len(prompts):
        cache.batch_select_indices(shared)
    mask = torch.cat([mask[shared], mask.new_ones(len(prompts), most)], dim=1)  # read up to the token that is next
    positions, logits = positions[shared], logits[shared]
    draw = _drawer(sampling, len(prompts), device)
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those in the cache, by their places in the batch
    active = set(rows)
    for step in range(1, most + 1):
        tokens = draw(logits, rows)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in active:
                written[row].append(token)
                if token in eos or len(written[row]) == limits[row]:
                    active.discard(row)
        if on_token is not None:
            on_token(len(prompts), step, most)
        if not active:
            break
        if (len(rows) - len(active)) * LEAVING >= len(rows):
            keep = [place for place, row in enumerate(rows) if row in active]
            kept = torch.tensor(keep, device=device)
            cache.batch_select_indices(kept)
            mask, positions, tokens = mask[kept], positions[kept], tokens[kept]
            rows = [rows[place] for place in keep]
        logits = reader.read(tokens[:, None], mask[:, : width + step], positions[:, None], cache)
        positions = positions + 1
    return written


class _Reader:
    """The model, reading tokens into a cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = base.config
        self._last_only = {"logits_to_keep": 1} if base._supports_logits_to_keep() else {}

    def read(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """The logits (B, V) after the last of the new tokens `ids` (B, T), which stand at `positions` (B, T)."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits


def _prefill(
    reader: _Reader, prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Read left-padded prompts: the cache, the mask (P, T), and the logits (P, V) of the first new token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache = DynamicCache(config=reader.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache, mask, reader.read(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)


def _drawer(sampling: Sampling, rows: int, device: torch.device) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    """How the next tokens (B,) are drawn from logits (B, V) of the given rows.

    What `torch.multinomial` does for one draw: the largest of p / q with q exponential. q is drawn for all rows, those
    that have left too, so that a row's draws do not depend on when others left.
    """
    if sampling.temperature == 0:
        return lambda logits, places: logits.argmax(-1)
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def draw(logits: torch.Tensor, places: list[int]) -> torch.Tensor:
        probabilities: torch.Tensor = warpers(None, logits).softmax(-1)
        noise = torch.empty(rows, logits.shape[-1], device=device).exponential_(1)
        if len(places) < rows:
            noise = noise[torch.tensor(places, device=device)]
        return (probabilities / noise).argmax(-1)

    return draw


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (B, heads, T, size) in a buffer with room for more tokens: transformers' own layer copies all of
    them for every token."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start empty."""
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' keys and values; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self._buffers or after > self._buffers[0].shape[-2]:
            self._grow(before, after, key_states, value_states)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., before:after, :] = new
        self.keys, self.values = (buffer[..., :after, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, a row as often as it is named."""
        super().batch_select_indices(indices)
        self._buffers = []

    def _grow(self, before: int, after: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        grown = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            shape = (*new.shape[:-2], after + SPARE_TOKENS, new.shape[-1])
            buffer = new.new_empty(shape)
            if before:
                buffer[..., :before, :] = old
            grown.append(buffer)
        self._buffers = grown
