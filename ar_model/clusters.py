"""Space-time clusters and the orders in which they are predicted (arXiv 2405.15160, sections 3.2 and 3.3).

All functions return index tensors. Tokens are numbered 0..L-1 in raster order (t, h, w). The rank of a cluster is its position
in the order. Random draws depend only on the seed of the sample.

Legend: B samples, N clusters, K tokens of a cluster, L = N * K tokens, R ranks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Order = Literal["random", "spatial-first", "temporal-first"]


@dataclass(frozen=True)
class ClusterGrid:
    """Partition of a (T, H, W) grid of tokens into boxes of (kt, kh, kw) tokens. Raises a ValueError if boxes do not fit."""

    grid: tuple[int, int, int]
    box: tuple[int, int, int]

    def __post_init__(self) -> None:
        for axis, tokens, side in zip("thw", self.grid, self.box, strict=True):
            if side < 1 or tokens % side:
                box, grid = ("x".join(map(str, sides)) for sides in (self.box, self.grid))
                divisors = ", ".join(str(n) for n in range(1, tokens + 1) if tokens % n == 0)
                hint = f"objective.clusters can be {divisors} along {axis}"
                raise ValueError(f"clusters of {box} tokens do not divide the grid of {grid} tokens: {hint}")

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of clusters along t, h and w."""
        (t, h, w), (kt, kh, kw) = self.grid, self.box
        return t // kt, h // kh, w // kw

    def members(self) -> Tensor:
        """Return the token indices of every cluster, (N, K), clusters in raster order."""
        kt, kh, kw = self.box
        tokens = torch.arange(self.grid[0] * self.grid[1] * self.grid[2]).view(self.grid)
        return rearrange(tokens, "(t kt) (h kh) (w kw) -> (t h w) (kt kh kw)", kt=kt, kh=kh, kw=kw)


def cluster_order(clusters: ClusterGrid, order: Order, seed_B: Tensor) -> Tensor:
    """Return the cluster at each rank, (B, N), as a pure function of the samples' seeds (int64).

    `spatial-first` goes through all clusters of a time slice before the next slice. `temporal-first` goes through all clusters
    of a location before the next location.
    """
    t, h, w = clusters.counts
    raster = torch.arange(t * h * w, device=seed_B.device)
    if order == "random":
        return hashed(seed_B, len(raster), stream=0).argsort(dim=1)
    fixed_N = raster if order == "spatial-first" else rearrange(raster, "(t h w) -> (h w t)", t=t, h=h, w=w)
    return fixed_N.expand(len(seed_B), -1)


def choose_clusters(order_BN: Tensor, count: int, seed_B: Tensor) -> Tensor:
    """Draw `count` clusters of each sample without replacement and keep their order, (B, count)."""
    rank_BR = hashed(seed_B, order_BN.shape[1], stream=2).argsort(dim=1)[:, :count].sort(dim=1).values
    return order_BN.gather(1, rank_BR)


def tokens_by_rank(members_NK: Tensor, order_BR: Tensor, seed_B: Tensor) -> Tensor:
    """Return the token indices of the ordered clusters, (B, R, K), with the tokens of each cluster shuffled.

    A slice of the last axis is a uniform random subset of every cluster's tokens. `order_BR` may omit clusters.
    """
    (batch, ranks), k = order_BR.shape, members_NK.shape[1]
    shuffle_BRK = hashed(seed_B, ranks * k, stream=1).view(batch, ranks, k).argsort(dim=2)
    return members_NK[order_BR].gather(2, shuffle_BRK)


# SplitMix64's constants as int64, because PyTorch cannot multiply uint64.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def hashed(seed_B: Tensor, n: int, stream: int) -> Tensor:
    """Return pseudo-random int64 of shape (B, n): SplitMix64 (doi 10.1145/2660193.2660195) of (seed, stream, position).

    The generator is counter-based: the numbers of a sample do not depend on the batch, the device or earlier draws. Each use
    has its own stream: 0 orders, 1 tokens of a cluster, 2 choice of clusters, 3 masks, 4 blocks, 5 predicted tokens of VIMPAC;
    in fine-tuning 6 visible tokens, 7 stochastic depth, 8 crops and flips.
    """
    counter = torch.arange(n, device=seed_B.device) + stream * 2**32 + 1
    return _mix(_mix(seed_B)[:, None] + counter * _GAMMA)


def uniform(seed_B: Tensor, n: int, stream: int) -> Tensor:
    """Return pseudo-random float32 in [0, 1) of shape (B, n). Each has 24 bits, so its product with an integer m is below m."""
    return _shift(hashed(seed_B, n, stream), 40).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right without sign extension."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
