"""Space-time clusters and the orders in which they are predicted (arXiv 2405.15160, sections 3.2 and 3.3).

Everything is an index tensor; tokens are numbered 0..L-1 in raster order (t, h, w).

Legend: B samples, N clusters, K tokens in a cluster, L = N * K tokens, r rank in the order.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Order = Literal["random", "spatial-first", "temporal-first"]


@dataclass(frozen=True)
class ClusterGrid:
    """A (T, H, W) grid of tokens cut into equal boxes of (kt, kh, kw) tokens.

    Raises:
        ValueError: if a side of the box does not divide the side of the grid.
    """

    grid: tuple[int, int, int]
    box: tuple[int, int, int]

    def __post_init__(self) -> None:
        for axis, tokens, side in zip("thw", self.grid, self.box, strict=True):
            if side < 1 or tokens % side:
                fit = ", ".join(str(n) for n in range(1, tokens + 1) if tokens % n == 0)
                raise ValueError(
                    f"clusters of {_x(self.box)} tokens do not divide the grid of {_x(self.grid)} tokens: "
                    f"objective.clusters can be {fit} along {axis}"
                )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Clusters along t, h and w."""
        (t, h, w), (kt, kh, kw) = self.grid, self.box
        return t // kt, h // kh, w // kw

    def members(self) -> Tensor:
        """Token indices of every cluster, (N, K), clusters in raster order."""
        kt, kh, kw = self.box
        tokens = torch.arange(self.grid[0] * self.grid[1] * self.grid[2]).view(self.grid)
        return rearrange(tokens, "(t kt) (h kh) (w kw) -> (t h w) (kt kh kw)", kt=kt, kh=kh, kw=kw)


def cluster_order(clusters: ClusterGrid, order: Order, seed_B: Tensor) -> Tensor:
    """The cluster at each rank, (B, N); a pure function of the samples' seeds (int64).

    `spatial-first` finishes a slice of time before the next begins, `temporal-first` a place before the next place.
    """
    t, h, w = clusters.counts
    raster = torch.arange(t * h * w, device=seed_B.device)
    if order == "random":
        return hashed(seed_B, len(raster), stream=0).argsort(dim=1)
    fixed = raster if order == "spatial-first" else rearrange(raster, "(t h w) -> (h w t)", t=t, h=h, w=w)
    return fixed.expand(len(seed_B), -1)


def some_ranks(order_BN: Tensor, count: int, seed_B: Tensor) -> Tensor:
    """A random choice of `count` clusters of each sample, in the order that they have, (B, count)."""
    chosen_BR = hashed(seed_B, order_BN.shape[1], stream=2).argsort(dim=1)[:, :count].sort(dim=1).values
    return order_BN.gather(1, chosen_BR)


def tokens_by_rank(members_NK: Tensor, order_BN: Tensor, seed_B: Tensor) -> Tensor:
    """Token indices with clusters sorted by rank and the tokens inside each shuffled, (B, N, K).

    The order may leave clusters out. Cutting a slice from the last axis is therefore a uniform draw of tokens from every cluster.
    """
    (batch, n), k = order_BN.shape, members_NK.shape[1]
    shuffle = hashed(seed_B, n * k, stream=1).view(batch, n, k).argsort(dim=2)
    return members_NK[order_BN].gather(2, shuffle)


def hashed(seed_B: Tensor, n: int, stream: int) -> Tensor:
    """Pseudo-random int64 of shape (B, n): SplitMix64 (doi 10.1145/2660193.2660195) of (seed, stream, position).

    Counter-based, so the draw of a sample does not depend on the batch, the device or anything drawn before.
    """
    counter = torch.arange(n, device=seed_B.device) + stream * 2**32 + 1
    x = _mix(_mix(seed_B)[:, None] + counter * -7046029254386353131)  # the golden gamma 0x9E3779B97F4A7C15 as int64
    return x


def uniform(seed_B: Tensor, n: int, stream: int) -> Tensor:
    """Pseudo-random float32 in [0, 1) of shape (B, n), from `hashed`; times n, rounded down, it is below n."""
    return _shift(hashed(seed_B, n, stream), 40).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _x(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))
