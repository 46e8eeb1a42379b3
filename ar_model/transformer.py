"""The trunk that all objectives share: pre-norm transformer blocks, an encoder, a cross-attention decoder, positions.

The blocks know nothing of orders or clusters: positions are data, gathered together with the tokens they belong to.

Legend: B batch, L tokens, M tokens of the context, D width.
"""

import math
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch  # the budget of compiled blocks has no other door
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ar_model.attention import Attention, Mask, Rotation

Grid = tuple[int, int, int]


def sincos_positions(grid: Grid, width: int, trained: Grid | None = None) -> Tensor:
    """Fixed sine-cosine codes of all (t, h, w) of a grid in raster order, (L, width).

    A third of the channels (even, the rest goes to time) belongs to each axis, half sines and half cosines
    (arXiv 1706.03762, section 3.5). `trained`: as in `positions_of`.
    """
    side = width // 6 * 2
    axes = (width - 2 * side, side, side)
    codes = []
    for ids_L, channels in zip(positions_of(grid, trained).T, axes, strict=True):
        # Grids are tens of steps long, not the thousands of a text: wavelengths from 2 pi to 100 times that.
        rate = 100.0 ** (-torch.arange(channels // 2) / max(1, channels // 2))
        angle = ids_L[:, None] * rate
        codes += [angle.sin(), angle.cos()]
        if channels % 2:
            codes.append(torch.zeros(len(ids_L), 1))
    return torch.cat(codes, dim=1)


def flat_positions(count: int, width: int) -> Tensor:
    """Fixed sine-cosine codes of the numbers 0..count - 1 of tokens in raster order, (count, width): VideoMAE's, which
    know no grid (arXiv 2203.12602, its code; the formula of arXiv 1706.03762, section 3.5)."""
    rate_D = 10000.0 ** (-2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle_LD = torch.arange(count, dtype=torch.float64)[:, None] * rate_D
    angle_LD[:, 0::2], angle_LD[:, 1::2] = angle_LD[:, 0::2].sin(), angle_LD[:, 1::2].cos()
    return angle_LD.float()


def rotary_angles(grid: Grid, head_width: int, trained: Grid | None = None) -> Tensor:
    """Angles of axial rotary positions for all (t, h, w) of a grid in raster order, (L, head_width / 2).

    A third of the pairs of channels (the rest goes to time) turns with each axis. `trained`: as in `positions_of`.
    """
    pairs = head_width // 2
    axes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    # One turn takes from 4 tokens, so that neighbours differ clearly, to 80, so that no grid is wider than a turn.
    rates = [math.pi / 2 * 20.0 ** (-torch.arange(n) / max(1, n)) for n in axes]
    ids_L3 = positions_of(grid, trained)
    return torch.cat([ids_L3[:, i, None] * rate for i, rate in enumerate(rates)], dim=1)


def positions_of(grid: Grid, trained: Grid | None = None) -> Tensor:
    """(t, h, w) of every token in raster order, (L, 3).

    For a model that was `trained` on another grid both grids cover the same extent: a place of one has the position
    that it has in the other (arXiv 2010.11929, section 3.2, interpolates its learned positions so).
    """
    axes = []
    for n, known in zip(grid, trained or grid, strict=True):
        ids = torch.arange(n, dtype=torch.float32)
        axes.append(ids if n == known else (ids + 0.5) * (known / n) - 0.5)
    return torch.cartesian_prod(*axes).view(-1, 3)


class Positions(nn.Module):
    """Where the tokens of a grid are: sine-cosine codes to add to them and, with `rope`, turns of queries and keys.

    `flat`: codes of their number in raster order instead of (t, h, w).
    """

    def __init__(
        self, grid: Grid, width: int, heads: int, rope: bool, trained: Grid | None = None, *, flat: bool = False
    ) -> None:
        super().__init__()
        self.grid, self.width, self.heads, self.rope, self.flat = grid, width, heads, rope, flat
        self.code_LD: Tensor
        self.angle_LA: Tensor
        code_LD = flat_positions(math.prod(grid), width) if flat else sincos_positions(grid, width, trained)
        self.register_buffer("code_LD", code_LD, persistent=False)
        self.register_buffer("angle_LA", rotary_angles(grid, width // max(1, heads), trained), persistent=False)

    def forward(self, tokens_BM: Tensor) -> tuple[Tensor, Rotation | None]:
        """Codes (B, M, D) and rotation of some tokens, which are numbered in raster order."""
        return self.code_LD[tokens_BM], Rotation.of(self.angle_LA[tokens_BM]) if self.rope else None

    def for_width(self, width: int, heads: int) -> "Positions":
        """The same positions for tokens of another width."""
        return Positions(self.grid, width, heads, self.rope, flat=self.flat)

    def laid_over(self, grid: Grid) -> "Positions":
        """Those of another grid of the same extent (see `positions_of`)."""
        if grid == self.grid:
            return self
        laid = Positions(grid, self.width, self.heads, self.rope, self.grid, flat=self.flat)
        return laid.to(self.code_LD.device)


class MLP(nn.Sequential):
    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """Self-attention and MLP, each with its norm before and a residual around (arXiv 2010.11929)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x_BLD: Tensor, mask: Mask = None, rotation: Rotation | None = None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), None, mask, rotation)
        return x_BLD + self.mlp(self.norm2(x_BLD))


class AttentionContext(NamedTuple):
    """Where a decoder's queries and its context are, and what of the context, and of each other, the queries see."""

    mask: Mask = None
    rotation: Rotation | None = None
    context_rotation: Rotation | None = None
    self_mask: Mask = None


class CrossBlock(nn.Module):
    """Cross-attention and MLP; `with_self`: self-attention before them (arXiv 2405.15160, table 9)."""

    def __init__(self, width: int, heads: int, with_self: bool) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width, eps=1e-6) if with_self else None
        self.self_attention = Attention(width, heads) if with_self else None
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x_BLD: Tensor, context_BMD: Tensor, sight: AttentionContext) -> Tensor:
        if self.self_attention is not None and self.self_norm is not None:
            x_BLD = x_BLD + self.self_attention(self.self_norm(x_BLD), None, sight.self_mask, sight.rotation)
        seen = self.attention(self.norm1(x_BLD), context_BMD, sight.mask, sight.rotation, sight.context_rotation)
        x_BLD = x_BLD + seen
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Stack(nn.Module):
    """Blocks one after another. With `recompute` their inner values are computed again in the backward pass, not kept."""

    blocks: nn.ModuleList
    recompute = False

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Encoder(Stack):
    """Tokens (B, L, D) -> the output of every block, a list of (B, L, D); `norm` belongs behind the last."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BLD: Tensor, mask: Mask = None, rotation: Rotation | None = None) -> list[Tensor]:
        layers = []
        for block in self.blocks:
            x_BLD = self._run(block, x_BLD, mask, rotation)
            layers.append(x_BLD)
        return layers

    def last(self, x_BLD: Tensor, mask: Mask = None, rotation: Rotation | None = None) -> Tensor:
        """The normalised output of the last block."""
        return self.norm(self(x_BLD, mask, rotation)[-1])


class CrossDecoder(Stack):
    """Queries (B, L, D) read an encoder's output (B, M, D_encoder) -> (B, L, D)."""

    def __init__(self, width: int, depth: int, heads: int, context_width: int, *, with_self: bool = False) -> None:
        super().__init__()
        self.context = nn.Linear(context_width, width)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, with_self) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BLD: Tensor, context_BME: Tensor, sight: AttentionContext) -> Tensor:
        context_BMD = self.context(context_BME)
        for block in self.blocks:
            x_BLD = self._run(block, x_BLD, context_BMD, sight)
        return self.norm(x_BLD)


class SelfDecoder(Stack):
    """Queries (B, Q, D) and an encoder's output (B, M, D_encoder) attend to each other -> the queries' outputs (B, Q, D)."""

    def __init__(self, width: int, depth: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.context = nn.Linear(context_width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, x_BQD: Tensor, context_BME: Tensor, position_BMD: Tensor, rotation: Rotation | None = None
    ) -> Tensor:
        """`position_BMD` is added to the context; `rotation` is of the context, then of the queries."""
        both_BLD = torch.cat([self.context(context_BME) + position_BMD, x_BQD], dim=1)
        for block in self.blocks:
            both_BLD = self._run(block, both_BLD, None, rotation)
        return self.norm(both_BLD[:, -x_BQD.shape[1] :])


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of every block for the backward pass: less memory, a fifth more arithmetic, equal numbers."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = True


COMPILED_MEMORY = 0.7
"""Share of what autograd would keep that compiled blocks may keep; what is cheap to compute again is. Of ViT-B on a CPU this
saves 40 % of the memory and costs no time that we could measure; 0.4 saves a little more and costs a tenth."""


def compile_blocks(model: nn.Module) -> None:
    """Compile every block in place: names of parameters stay as they are, and equal blocks share one compilation."""
    functorch.activation_memory_budget = COMPILED_MEMORY
    for module in model.modules():
        if isinstance(module, Block | CrossBlock):
            module.compile()


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
