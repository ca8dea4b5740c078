"""The decode loop of text generation: prompts that are the same are read once, and rows that are finished leave.

Token by token it gives what `generate` of transformers gives: greedily the same tokens, and sampled, from the same
random state, the same draws. P different prompts, B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from stagekit.kept import Kept, prefill
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
    kept: Kept | None = None,
    names: Sequence[str] = (),
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, EOS included where there is one.

    Equal prompts (the samples of one prompt) share one prefill. A row leaves the batch when it is finished, so the
    others do not wait for it. The model must be in evaluation mode, and the caller seeds torch.

    Args:
        prompts: token ids of each row's prompt.
        limits: most new tokens of each row.
        on_token: called after every token with the number of rows, of tokens so far and of tokens at most.
        kept: what earlier turns read, for a model that `kept.can_keep`; what this one reads is kept there too.
        names: with `kept`, each row's conversation; a row without a name is not kept.
    """
    batch, logits = _start(_Reader(model), prompts, max(limits), pad, kept, names)
    draw = _drawer(sampling, len(prompts), logits.device)
    written: list[list[int]] = [[] for _ in prompts]
    active = set(batch.rows)
    for step in range(1, max(limits) + 1):
        tokens = draw(logits, batch.rows)
        for row, token in zip(batch.rows, tokens.tolist(), strict=True):
            if row in active:
                written[row].append(token)
                if token in eos or len(written[row]) == limits[row]:
                    active.discard(row)
        if on_token is not None:
            on_token(len(prompts), step, max(limits))
        gone = [place for place, row in enumerate(batch.rows) if row not in active]
        if gone and (not active or len(gone) * LEAVING >= len(batch.rows)):
            if kept is not None:
                _keep(kept, names, batch, gone, prompts, written)
            if not active:
                break
            tokens = batch.without(set(gone), tokens)
        logits = batch.read(tokens, step)
    return written


@dataclass
class _Batch:
    """The rows in the cache, by their places in the caller's order: what is read of them, left-padded to `width`.

    `mask` (B, width + most) has room for all new tokens; `positions` (B,) are those of the next ones.
    """

    reader: "_Reader"
    cache: DynamicCache
    mask: torch.Tensor
    positions: torch.Tensor
    width: int
    rows: list[int]

    def read(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """Read the new tokens (B,) number `step`: the logits (B, V) of the next."""
        mask = self.mask[:, : self.width + step]
        logits = self.reader.read(tokens[:, None], mask, self.positions[:, None], self.cache)
        self.positions = self.positions + 1
        return logits

    def without(self, gone: set[int], tokens: torch.Tensor) -> torch.Tensor:
        """Take rows, by their places here, out of the cache; returns the tokens (B,) of the others."""
        staying = [place for place in range(len(self.rows)) if place not in gone]
        chosen = torch.tensor(staying, device=tokens.device)
        self.cache.batch_select_indices(chosen)
        self.mask, self.positions = self.mask[chosen], self.positions[chosen]
        self.rows = [self.rows[place] for place in staying]
        return tokens[chosen]


def _keep(
    kept: Kept,
    names: Sequence[str],
    batch: _Batch,
    places: Sequence[int],
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
) -> None:
    """Keep what was read of the rows at these places of the batch; the last token of each was drawn and not read."""
    for place in places:
        row = batch.rows[place]
        if names[row]:
            start = batch.width - len(prompts[row])
            kept.keep(names[row], [*prompts[row], *written[row][:-1]], batch.cache, place, start)


def _start(
    reader: "_Reader",
    prompts: Sequence[Sequence[int]],
    most: int,
    pad: int,
    kept: Kept | None,
    names: Sequence[str],
) -> tuple[_Batch, torch.Tensor]:
    """Read the prompts, equal ones once: the batch, and the logits (B, V) of its first new tokens."""
    device = next(reader.model.parameters()).device
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    places = {prompt: place for place, prompt in enumerate(distinct)}
    if kept is None:
        cache, mask, logits = _prefill(reader, distinct, pad, device)
    else:
        name_of = dict(zip(map(tuple, prompts), names, strict=True))
        known = [kept.take(name_of[prompt]) for prompt in distinct]
        cache, mask, logits = prefill(reader.go_on, reader.new_cache, distinct, known, pad, device)
    positions, width = mask.sum(-1), mask.shape[1]
    shared = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
    if len(distinct) < len(prompts):
        cache.batch_select_indices(shared)
    mask = torch.cat([mask[shared], mask.new_ones(len(prompts), most)], dim=1)  # read up to the token that is next
    batch = _Batch(reader, cache, mask, positions[shared], width, list(range(len(prompts))))
    return batch, logits[shared]


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

    def go_on(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The same, at the positions that follow from the mask (B, cached + T) of left-padded rows."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self.read(ids, mask, positions[:, -ids.shape[1] :], cache)

    def new_cache(self) -> DynamicCache:
        """An empty cache for the model."""
        cache = DynamicCache(config=self.config)
        cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache


def _prefill(
    reader: _Reader, prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Read left-padded prompts: the cache, the mask (P, T), and the logits (P, V) of the first new token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache = reader.new_cache()
    return cache, mask, reader.go_on(ids, mask, cache)


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
