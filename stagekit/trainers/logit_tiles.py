"""How many tokens' logits are in memory at once where TRL's fused head scores a batch.

TRL's head makes logits in tiles, of 4096 tokens. On an accelerator a kernel reads each tile once. On the CPU some ten
operations pass over it one by one, each with a result of the tile's size, so that a tile that leaves the caches costs
more time than all that is computed with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.kernels import chunked_logprob


ON_CPU = 128
"""Tokens of a tile on the CPU, unless told otherwise; `benchmarks/README.md` has what others take."""


def tokens_at_once(given: int | None, device: torch.device) -> int:
    """What was given; else `ON_CPU` on the CPU and TRL's own number elsewhere."""
    if given is not None:
        return given
    return ON_CPU if device.type == "cpu" else int(chunked_logprob.TOKEN_CHUNK_SIZE)


@contextmanager
def logit_tiles(tokens: int) -> Iterator[None]:
    """While it lasts, TRL's fused head holds the logits of so many tokens at once, in forward and backward passes.

    Changes no number but by the order in which the gradient of the head is summed.
    """
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    chunked_logprob.TOKEN_CHUNK_SIZE = tokens
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = before
