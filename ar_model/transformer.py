"""Pre-norm transformer shared by all objectives: positions, blocks, an encoder, and decoders with cross- or self-attention.

The blocks do not depend on orders or clusters, because the position of each token is gathered together with the token.

Legend: B batch, L tokens, M context tokens, Q queries, D width, E width of the context, A rotary angles, S blocks.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

# activation_memory_budget has no public API.
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ar_model.attention import Attention, Rotation
from ar_model.attention_mask import Mask
from ar_model.inputs import Grid

_MAX_DEPTH = 1024


def sincos_positions(grid: Grid, width: int, trained: Grid | None = None) -> Tensor:
    """Return fixed 3-D sine-cosine encodings of all tokens of a grid in raster order, (L, width).

    Each axis has channels of its own (`axis_channels`), half sines and half cosines (arXiv 1706.03762, section 3.5). `trained`:
    see `positions_of`.
    """
    encodings = []
    for ids_L, channels in zip(positions_of(grid, trained).T, axis_channels(width), strict=True):
        # Grids have tens of steps, while texts have thousands: wavelengths range from 2 pi to 100 * 2 pi, not 10000 * 2 pi.
        rate = 100.0 ** (-torch.arange(channels // 2) / max(1, channels // 2))
        angle = ids_L[:, None] * rate
        encodings += [angle.sin(), angle.cos()]
        if channels % 2:
            encodings.append(torch.zeros(len(ids_L), 1))
    return torch.cat(encodings, dim=1)


def axis_channels(width: int) -> tuple[int, int, int]:
    """Return the channels of time, rows and columns: an even third for rows and columns each, and the rest for time."""
    side = width // 6 * 2
    return width - 2 * side, side, side


def flat_positions(grid: Grid, width: int, trained: Grid | None = None) -> Tensor:
    """Return fixed 1-D sine-cosine encodings of token indices in raster order, (L, width), as in the code of VideoMAE.

    The formula is from arXiv 1706.03762, section 3.5; VideoMAE is arXiv 2203.12602. `trained`: see `positions_of`. The index of a
    place is then its index in the trained grid, so that a place keeps its encoding.
    """
    rate_D = 10000.0 ** (-2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    _, rows, columns = trained or grid
    index_LD = torch.zeros(math.prod(grid), width, dtype=torch.float64)
    for ids_L, step in zip(positions_of(grid, trained).double().T, (rows * columns, columns, 1), strict=True):
        # A channel that turns by more than a radian from one trained row to the next has no meaning between rows: it keeps the
        # value of the nearest row. The same holds for time slices.
        index_LD += step * torch.where(rate_D * step > 1, (ids_L[:, None] + 0.5).floor(), ids_L[:, None])
    angle_LD = index_LD * rate_D
    angle_LD[:, 0::2], angle_LD[:, 1::2] = angle_LD[:, 0::2].sin(), angle_LD[:, 1::2].cos()
    return angle_LD.float()


def rotary_angles(grid: Grid, head_width: int, trained: Grid | None = None) -> Tensor:
    """Return the angles of axial rotary positions of all tokens of a grid in raster order, (L, head_width / 2).

    Rows and columns get a third of the channel pairs each, rounded down, and time gets the rest. `trained`: see `positions_of`.
    """
    pairs = head_width // 2
    pairs_per_axis = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    # Periods range from 4 tokens, so that neighbours differ clearly, to 80 tokens, so that no grid is longer than a period.
    rates = [math.pi / 2 * 20.0 ** (-torch.arange(n) / max(1, n)) for n in pairs_per_axis]
    ids_L3 = positions_of(grid, trained)
    return torch.cat([ids_L3[:, i, None] * rate for i, rate in enumerate(rates)], dim=1)


def positions_of(grid: Grid, trained: Grid | None = None) -> Tensor:
    """Return the position (t, h, w) of every token in raster order, (L, 3).

    `trained` is the grid that the model was trained on, if it differs from `grid`. Both grids then cover the same extent, so
    positions are scaled from `grid` to `trained` (arXiv 2010.11929, section 3.2, interpolates learned positions in this way).
    """
    axes = []
    for n, trained_n in zip(grid, trained or grid, strict=True):
        ids = torch.arange(n, dtype=torch.float32)
        axes.append(ids if n == trained_n else (ids + 0.5) * (trained_n / n) - 0.5)
    return torch.cartesian_prod(*axes).view(-1, 3)


class Positions(nn.Module):
    """Positions of the tokens of a grid: sine-cosine encodings to add to tokens and, with `rope`, rotary positions.

    `flat`: encode the token index in raster order instead of (t, h, w). The buffers are not saved with a model.
    """

    def __init__(
        self, grid: Grid, width: int, heads: int, rope: bool, trained: Grid | None = None, *, flat: bool = False
    ) -> None:
        super().__init__()
        self.grid, self.width, self.heads, self.rope, self.flat = grid, width, heads, rope, flat
        encoding_LD = (flat_positions if flat else sincos_positions)(grid, width, trained)
        self.encoding_LD = nn.Buffer(encoding_LD, persistent=False)
        self.angle_LA = nn.Buffer(rotary_angles(grid, width // max(1, heads), trained), persistent=False)

    def forward(self, tokens_BM: Tensor) -> tuple[Tensor, Rotation | None]:
        """Return the encodings (B, M, D) and the rotation of the tokens with these indices (raster order)."""
        return self.encoding_LD[tokens_BM], Rotation.from_angles(self.angle_LA[tokens_BM]) if self.rope else None

    def for_width(self, width: int, heads: int) -> "Positions":
        """Return the same positions for tokens of another width."""
        return Positions(self.grid, width, heads, self.rope, flat=self.flat)

    def resized(self, grid: Grid) -> "Positions":
        """Return the positions of another grid that covers the same extent (see `positions_of`)."""
        if grid == self.grid:
            return self
        positions = Positions(grid, self.width, self.heads, self.rope, self.grid, flat=self.flat)
        return positions.to(self.encoding_LD.device)


class MLP(nn.Sequential):
    """Two linear layers with a GELU between them. The hidden layer is four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm self-attention and MLP with residual connections (arXiv 2010.11929)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(
        self, x_BLD: Tensor, mask: Mask = None, rotation: Rotation | None = None, path_2B: Tensor | None = None
    ) -> Tensor:
        """Return the output, (B, L, D). `path_2B`: factor of the attention and of the MLP of each sample (stochastic depth)."""
        attention = self.attention(self.norm1(x_BLD), None, mask, rotation)
        x_BLD = x_BLD + (attention if path_2B is None else attention * path_2B[0, :, None, None])
        mlp = self.mlp(self.norm2(x_BLD))
        return x_BLD + (mlp if path_2B is None else mlp * path_2B[1, :, None, None])


class AttentionContext(NamedTuple):
    """Masks and rotary positions of a decoder."""

    mask: Mask = None
    """Mask of the context tokens that a query sees."""
    rotation: Rotation | None = None
    """Positions of the queries."""
    context_rotation: Rotation | None = None
    """Positions of the context tokens."""
    self_mask: Mask = None
    """Mask of the queries that a query sees, in decoders with self-attention."""


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP; `with_self` puts self-attention before them (arXiv 2405.15160, table 9)."""

    def __init__(self, width: int, heads: int, with_self: bool) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width, eps=1e-6) if with_self else None
        self.self_attention = Attention(width, heads) if with_self else None
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x_BQD: Tensor, context_BMD: Tensor, attention_context: AttentionContext) -> Tensor:
        mask, rotation, context_rotation, self_mask = attention_context
        if self.self_attention is not None and self.self_norm is not None:
            x_BQD = x_BQD + self.self_attention(self.self_norm(x_BQD), None, self_mask, rotation)
        x_BQD = x_BQD + self.attention(self.norm1(x_BQD), context_BMD, mask, rotation, context_rotation)
        return x_BQD + self.mlp(self.norm2(x_BQD))


class Stack(nn.Module):
    """Base class of encoder and decoders: a sequence of blocks, with activation checkpointing if `recompute` is set."""

    blocks: nn.ModuleList
    recompute = False

    def _run(self, x: Tensor, *inputs: Any, own: Iterable[Tensor] | None = None) -> list[Tensor]:
        """Return the input `x` and the output of every block. `own`: a last input of each block."""
        layers = [x]
        last = [()] * len(self.blocks) if own is None else [(value,) for value in own]
        for block, more in zip(self.blocks, last, strict=True):
            if self.recompute and torch.is_grad_enabled():
                layers.append(checkpoint(block, layers[-1], *inputs, *more, use_reentrant=False))
            else:
                layers.append(block(layers[-1], *inputs, *more))
        return layers


def _stack(depth: int, make_block: Callable[[], nn.Module]) -> nn.ModuleList:
    """Return `depth` new blocks. Raises a ValueError for a number of blocks that would take minutes to build."""
    if not 0 <= depth <= _MAX_DEPTH:
        raise ValueError(f"a network has at most {_MAX_DEPTH} blocks, got {depth}")
    return nn.ModuleList(make_block() for _ in range(depth))


class Encoder(Stack):
    """Sequence of self-attention blocks. Only `last` applies the final layer norm."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = _stack(depth, lambda: Block(width, heads))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, x_BLD: Tensor, mask: Mask = None, rotation: Rotation | None = None, path_S2B: Tensor | None = None
    ) -> list[Tensor]:
        """Return the output of every block, (B, L, D) each, first to last, without the final norm. `path_S2B`: see `Block`."""
        return self._run(x_BLD, mask, rotation, own=path_S2B)[1:]

    def drop_norm(self) -> None:
        """Delete the final norm, which only `last` applies."""
        del self.norm

    def last(self, x_BLD: Tensor, mask: Mask = None, rotation: Rotation | None = None) -> Tensor:
        """Return the normalised output of the last block, (B, L, D)."""
        return self.norm(self(x_BLD, mask, rotation)[-1])


class CrossDecoder(Stack):
    """Decoder whose queries (B, Q, D) attend to an encoder's output (B, M, E) -> (B, Q, D)."""

    def __init__(self, width: int, depth: int, heads: int, context_width: int, *, with_self: bool = False) -> None:
        super().__init__()
        self.context = nn.Linear(context_width, width)
        self.blocks = _stack(depth, lambda: CrossBlock(width, heads, with_self))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BQD: Tensor, context_BME: Tensor, attention_context: AttentionContext) -> Tensor:
        return self.norm(self._run(x_BQD, self.context(context_BME), attention_context)[-1])


class SelfDecoder(Stack):
    """Decoder in which queries (B, Q, D) and an encoder's output (B, M, E) attend to each other -> (B, Q, D)."""

    def __init__(self, width: int, depth: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.context = nn.Linear(context_width, width, bias=False)
        self.blocks = _stack(depth, lambda: Block(width, heads))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, x_BQD: Tensor, context_BME: Tensor, position_BMD: Tensor, rotation: Rotation | None = None
    ) -> Tensor:
        """Decode the queries. `position_BMD` is added to the context. `rotation` covers the context tokens, then the queries."""
        x_BLD = torch.cat([self.context(context_BME) + position_BMD, x_BQD], dim=1)
        return self.norm(self._run(x_BLD, None, rotation)[-1][:, -x_BQD.shape[1] :])


def recompute_activations(model: nn.Module) -> None:
    """Turn on activation checkpointing of every block. It saves memory, costs a fifth more FLOPs and gives the same results."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = True


COMPILED_MEMORY = 0.7
"""Share of the activations that compiled blocks may save for the backward pass. The compiler recomputes the cheapest ones. For
ViT-B on a CPU, 0.7 saves 40 % of the memory at no measurable cost; 0.4 saves a little more and costs a tenth of the speed."""


def compile_blocks(model: nn.Module) -> None:
    """Compile every block in place. Parameter names do not change, and equal blocks share one compilation."""
    functorch.activation_memory_budget = COMPILED_MEMORY
    # DDP's graph optimizer splits graphs at its buckets, which are larger than a block. Some versions refuse FlexAttention.
    torch._dynamo.config.optimize_ddp = False
    for module in model.modules():
        if isinstance(module, Block | CrossBlock):
            module.compile()


def init_weights(module: nn.Module) -> None:
    """Initialise a linear layer with Xavier-uniform weights (arXiv 2203.12602) and zero biases. Other modules do not change."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
