"""Attention mask of encoder and decoder."""

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

    def visible(self, device: torch.device) -> Tensor:
        """Return a bool tensor (Q, K), true where the query sees the key."""
        block = torch.arange(self.blocks, device=device)
        return block.repeat_interleave(self.queries)[:, None] >= block.repeat_interleave(self.keys)[None, :]


Mask = BlockMask | None
"""None: every query sees every key."""
