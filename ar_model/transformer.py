"""The trunk that all objectives share: pre-norm transformer blocks, an encoder, a cross-attention decoder, positions.

The blocks know nothing of orders or clusters: positions are data, gathered together with the tokens they belong to.

Legend: B batch, L tokens, M tokens of the context, D width.
"""

import math

import torch
from torch import Tensor, nn

from ar_model.attention import Attention, Mask, Rotation


def sincos_positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """Fixed sine-cosine codes of all (t, h, w) of a grid in raster order, (L, width).

    A third of the channels (even, the rest goes to time) belongs to each axis, half sines and half cosines
    (arXiv 1706.03762, section 3.5).
    """
    side = width // 6 * 2
    axes = (width - 2 * side, side, side)
    codes = []
    for ids_L, channels in zip(_ids(grid).T, axes, strict=True):
        # Grids are tens of steps long, not the thousands of a text: wavelengths from 2 pi to 100 times that.
        rate = 100.0 ** (-torch.arange(channels // 2) / max(1, channels // 2))
        angle = ids_L[:, None] * rate
        codes += [angle.sin(), angle.cos()]
        if channels % 2:
            codes.append(torch.zeros(len(ids_L), 1))
    return torch.cat(codes, dim=1)


def rotary_angles(grid: tuple[int, int, int], head_width: int) -> Tensor:
    """Angles of axial rotary positions for all (t, h, w) of a grid in raster order, (L, head_width / 2).

    A third of the pairs of channels (the rest goes to time) turns with each axis.
    """
    pairs = head_width // 2
    axes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    # One turn takes from 4 tokens, so that neighbours differ clearly, to 80, so that no grid is wider than a turn.
    rates = [math.pi / 2 * 20.0 ** (-torch.arange(n) / max(1, n)) for n in axes]
    return torch.cat([_ids(grid)[:, i, None] * rate for i, rate in enumerate(rates)], dim=1)


def _ids(grid: tuple[int, int, int]) -> Tensor:
    """(t, h, w) of every token in raster order, (L, 3)."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid)).view(-1, 3)


class MLP(nn.Sequential):
    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """Attention and MLP, each with its norm before and a residual around (arXiv 2010.11929).

    Self-attention, or with a context cross-attention only: then the tokens do not see each other (arXiv 2405.15160, table 9).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(
        self,
        x_BLD: Tensor,
        context_BMD: Tensor | None = None,
        mask: Mask = None,
        rotation: Rotation | None = None,
        context_rotation: Rotation | None = None,
    ) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), context_BMD, mask, rotation, context_rotation)
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Encoder(nn.Module):
    """Tokens (B, L, D) -> the output of every block, a list of (B, L, D); `norm` belongs behind the last."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BLD: Tensor, mask: Mask = None, rotation: Rotation | None = None) -> list[Tensor]:
        layers = []
        for block in self.blocks:
            x_BLD = block(x_BLD, mask=mask, rotation=rotation)
            layers.append(x_BLD)
        return layers


class CrossDecoder(nn.Module):
    """Queries (B, L, D) read an encoder's output (B, M, D_encoder) -> (B, L, D)."""

    def __init__(self, width: int, depth: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.context = nn.Linear(context_width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self,
        x_BLD: Tensor,
        context_BME: Tensor,
        mask: Mask = None,
        rotation: Rotation | None = None,
        context_rotation: Rotation | None = None,
    ) -> Tensor:
        context_BMD = self.context(context_BME)
        for block in self.blocks:
            x_BLD = block(x_BLD, context_BMD, mask, rotation, context_rotation)
        return self.norm(x_BLD)


def init_weights(module: nn.Module) -> None:
    """Initial values of the trunk, for `module.apply`.

    | what             | value                                |
    |------------------|--------------------------------------|
    | linear weights   | Xavier uniform (arXiv 2203.12602)    |
    | biases           | 0                                    |
    | norms            | 1 and 0                              |
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
