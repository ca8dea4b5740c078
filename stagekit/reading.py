"""Reading rows of tokens with a model that is only asked: in batches, padded, in evaluation mode. B batch, T
tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def context_length(model: Any) -> int | None:
    """The most tokens that the model reads; None: no limit known."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context


def token_batches(indices: Sequence[int], rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """The rows, longest first, in batches of at most `batch_tokens` with their padding."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: -len(rows[index])):
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_logits(model: Any, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """What the model gives for rows of token ids, padded on the right: (B, labels) or (B, T, labels)."""
    width = max(len(row) for row in rows)
    device = next(model.parameters()).device
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards the mode each module was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
