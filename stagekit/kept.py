"""What a model has read of conversations, kept from one turn to the next, so that it is not read again.

A conversation's next prompt is compared, token by token, with what was read of it: what both begin with is taken
over, the rest is read. No row has a gap between its tokens: where one row of a pass has R tokens to read, all rows
read their last R, so the batch is padded on the left only, as every model takes it. That costs nothing, since the pass
is R wide anyway. What all prompts begin with (a system message, examples) is read once.

P prompts, H heads, T tokens, D size of a head, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


PASS = 96
"""What one more forward pass costs, in tokens read: prompts with little to read are read apart from those with much
where that saves more."""

Read = Callable[[torch.Tensor, torch.Tensor, DynamicCache], torch.Tensor]
"""Reads new tokens (P, T) under a mask (P, cached + T) into a cache: the logits (P, V) after the last ones."""

_CHANGING_ROTATIONS = {"dynamic", "longrope"}
"""Rotations of positions that depend on the conversation's length: its first tokens are other keys in a longer one."""


def can_keep(model: Any) -> bool:
    """Whether a model's cache can be cut and gone on with: one of plain keys and values in every layer, not one of a
    sliding window or of a state."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    rotations = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rotations, *(one for one in rotations.values() if isinstance(one, dict))]
    if any(one.get("rope_type") in _CHANGING_ROTATIONS for one in kinds):
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@dataclass(frozen=True)
class Known:
    """Token ids that were read, and each layer's keys and values (H, T, D) of at least these."""

    ids: Sequence[int]
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()


class Kept:
    """What was read of each conversation, by its name."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._known: dict[str, Known] = {}

    def take(self, name: str) -> Known:
        """What is known of a conversation, nothing where it is new; from here on it is the caller's, so that no more
        than it and the batch's own cache are in memory."""
        return self._known.pop(name, Known(()))

    def keep(self, name: str, ids: Sequence[int], cache: DynamicCache, row: int, start: int) -> None:
        """Keep a row's tokens `ids`, which stand in the cache from place `start` on."""
        self._known[name] = _known(ids, cache, row, start)


def prefill(
    read: Read,
    new_cache: Callable[[], DynamicCache],
    prompts: Sequence[Sequence[int]],
    known: Sequence[Known],
    pad: int,
    device: torch.device,
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Read what is not known of left-padded prompts.

    Args:
        read: the model.
        known: what was read of each prompt's conversation.

    Returns:
        The cache, the mask (P, T), and the logits (P, V) of the first new token.
    """
    known = _with_shared(read, new_cache, prompts, known, device)
    shared = [_common(one.ids, prompt) for one, prompt in zip(known, prompts, strict=True)]
    rests = [len(prompt) - count for prompt, count in zip(prompts, shared, strict=True)]
    parts = []
    for rows in _passes(sorted(range(len(prompts)), key=lambda row: -rests[row]), rests):
        new = max(rests[row] for row in rows)
        ids = torch.tensor([_left_padded(prompts[row][-new:], new, pad) for row in rows], device=device)
        old = [max(len(prompts[row]) - new, 0) for row in rows]
        cache = _cache_of([known[row] for row in rows], old, new_cache())
        mask = _mask([len(prompts[row]) for row in rows], max(old) + new, device)
        parts.append((rows, cache, read(ids, mask, cache)))
    width = max(map(len, prompts))
    logits = parts[0][2].new_empty(len(prompts), parts[0][2].shape[-1])
    for rows, _, found in parts:
        logits[torch.tensor(rows, device=device)] = found
    cache = _merged([(rows, cache) for rows, cache, _ in parts], width, new_cache)
    return cache, _mask([len(prompt) for prompt in prompts], width, device), logits


def _with_shared(
    read: Read,
    new_cache: Callable[[], DynamicCache],
    prompts: Sequence[Sequence[int]],
    known: Sequence[Known],
    device: torch.device,
) -> list[Known]:
    """`known`, with what all prompts begin with where less than that is known of several, and reading it once pays."""
    ordered = sorted(map(tuple, prompts))  # what the first and the last begin with, all between them begin with
    length = min(_common(ordered[0], ordered[-1]), min(map(len, prompts)) - 1)
    less = [row for row, one in enumerate(known) if _common(one.ids, prompts[row]) < length]
    if (len(less) - 1) * length <= PASS:
        return list(known)
    cache, ids = new_cache(), list(ordered[0][:length])
    read(torch.tensor([ids], device=device), torch.ones(1, length, dtype=torch.long, device=device), cache)
    prefix = _known(ids, cache, 0, 0)
    return [prefix if row in less else one for row, one in enumerate(known)]


def _common(known: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens both begin with; never all of the prompt's, whose last one has to be read for its logits."""
    most = min(len(known), len(prompt) - 1)
    return next((place for place in range(most) if known[place] != prompt[place]), most)


def _passes(rows: list[int], rests: Sequence[int]) -> list[list[int]]:
    """Rows, sorted by what is left to read, in as many passes as make the padded tokens and the passes fewest."""
    gains = [(len(rows) - place) * (rests[rows[0]] - rests[rows[place]]) for place in range(1, len(rows))]
    if not gains or max(gains) <= PASS:
        return [sorted(rows)]
    cut = 1 + gains.index(max(gains))
    return [*_passes(rows[:cut], rests), *_passes(rows[cut:], rests)]


def _left_padded(ids: Sequence[int], width: int, pad: int) -> list[int]:
    return [pad] * (width - len(ids)) + list(ids)


def _mask(lengths: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """A mask (P, width) of left-padded rows."""
    places = torch.arange(width, device=device)
    return (places >= width - torch.tensor(lengths, device=device)[:, None]).long()


def _known(ids: Sequence[int], cache: DynamicCache, row: int, start: int) -> Known:
    """A copy of the row's tokens, so that the batch's cache can be freed."""
    part = slice(start, start + len(ids))
    return Known(
        ids, [(layer.keys[row, :, part].clone(), layer.values[row, :, part].clone()) for layer in cache.layers]
    )


def _cache_of(known: Sequence[Known], lengths: Sequence[int], cache: DynamicCache) -> DynamicCache:
    """The empty `cache` with the first `lengths` tokens of each row, padded on the left."""
    width = max(lengths)
    if width == 0:
        return cache
    some = next(one for one in known if one.layers)
    for place, layer in enumerate(cache.layers):
        filled = []
        for side in (0, 1):
            like = some.layers[place][side]
            rows = like.new_zeros(len(known), like.shape[0], width, like.shape[2])
            for row, (one, length) in enumerate(zip(known, lengths, strict=True)):
                if length:
                    rows[row, :, width - length :] = one.layers[place][side][:, :length]
            filled.append(rows)
        layer.update(*filled)
    return cache


def _merged(
    parts: Sequence[tuple[list[int], DynamicCache]], width: int, new_cache: Callable[[], DynamicCache]
) -> DynamicCache:
    """One cache of `width` tokens from those of the passes, each with the rows that it has."""
    if len(parts) == 1:
        return parts[0][1]
    count, merged = sum(len(rows) for rows, _ in parts), new_cache()
    for place, layer in enumerate(merged.layers):
        filled = []
        for side in ("keys", "values"):
            like = getattr(parts[0][1].layers[place], side)
            whole = like.new_zeros(count, like.shape[1], width, like.shape[3])
            for rows, cache in parts:
                found = getattr(cache.layers[place], side)
                whole[torch.tensor(rows, device=like.device), :, width - found.shape[2] :] = found
            filled.append(whole)
        layer.update(*filled)
    return merged
