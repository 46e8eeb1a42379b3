"""Attention mask of encoder and decoder."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """Block-triangular mask with `queries` queries and `keys` keys per block. A query in block i sees the keys of blocks 0..i.

    Tokens are sorted by the rank of their cluster, so all samples of a batch share one mask although their orders differ. In the
    encoder, block i is the cluster of rank i. In the decoder, block i of the queries is the cluster of rank i + 1, so a query
    sees only clusters of lower rank.
    """

    blocks: int
    queries: int
    keys: int

    @property
    def causal(self) -> bool:
        """True for the causal mask of a language model: query i sees the keys 0..i."""
        return self.queries == self.keys == 1

    def visible(self, device: torch.device) -> Tensor:
        """Return a bool tensor (Q, K), true where the query sees the key."""
        block = torch.arange(self.blocks, device=device)
        return block.repeat_interleave(self.queries)[:, None] >= block.repeat_interleave(self.keys)[None, :]


Mask = BlockMask | None
"""None: every query sees every key."""


def bias_of(mask: BlockMask, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the mask as a bias (Q, K) to add to the scores: 0 or -inf."""
    # A compiled graph builds its own bias.
    make = _make_bias if torch.compiler.is_compiling() else _cached_bias
    return make(mask, device, dtype)


def _make_bias(mask: BlockMask, device: torch.device, dtype: torch.dtype) -> Tensor:
    hidden = ~mask.visible(device)
    return torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)


@functools.lru_cache(maxsize=64)
def _cached_bias(mask: BlockMask, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Training could not use a tensor that was made in inference mode.
    with torch.inference_mode(False):
        return _make_bias(mask, device, dtype)


def forget_masks() -> None:
    """Drop the cached bias tensors."""
    _cached_bias.cache_clear()
