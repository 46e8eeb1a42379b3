"""One description of who may see whom, one adapter per kernel that computes attention, one dense reference.

Legend: B batch, N heads, Q queries, K keys, H width of a head, G = B * N.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class BlockMask:
    """Queries and keys come in `blocks` equal runs; a query of run i sees the keys of runs 0..i.

    With both sides sorted by rank this one triangle serves every sample, whatever its order: in the encoder run i holds
    the clusters of rank i on both sides; in the decoder run i of the queries is rank i + 1: it sees lower ranks only.
    """

    blocks: int
    queries: int
    keys: int

    def visible(self, device: torch.device) -> Tensor:
        """Boolean (Q, K), true where the query sees the key."""
        run = torch.arange(self.blocks, device=device)
        return run.repeat_interleave(self.queries)[:, None] >= run.repeat_interleave(self.keys)[None, :]


Mask = BlockMask | None
"""None: everything sees everything."""


def reference(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """Attention by its definition, in fp32: what the adapters below are compared with."""
    scores = (q_BNQH.float() / math.sqrt(q_BNQH.shape[-1])) @ k_BNKH.float().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask.visible(scores.device), -torch.inf)
    return (scores.softmax(-1) @ v_BNKH.float()).to(v_BNKH.dtype)


def _bias(mask: BlockMask, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mask as a number to add to the scores, (Q, K)."""
    if torch.compiler.is_compiling():  # a compiled graph makes its own
        return _make_bias(mask, device, dtype)
    return _kept_bias(mask, device, dtype)


def _make_bias(mask: BlockMask, device: torch.device, dtype: torch.dtype) -> Tensor:
    hidden = ~mask.visible(device)
    return torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)


@functools.lru_cache(maxsize=64)
def _kept_bias(mask: BlockMask, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        return _make_bias(mask, device, dtype)


def forget_masks() -> None:
    """Drop the masks that are kept as tensors."""
    _kept_bias.cache_clear()


MOST_PIECES = 4
"""Into how many pieces plain attention cuts its queries to leave out keys that none of them sees: of four, 63 % is left."""
KEPT = 32 * 2**20
"""Bytes of attention weights that a layer of plain attention keeps for its backward pass; more are computed again."""
TILE, TILE_HEADS = 4 * 2**20, 4
"""Bytes of scores, and heads, that are worked on at once then: few enough to stay in the cache of a processor."""


def _pieces(mask: Mask, queries: int, keys: int) -> Iterator[tuple[range, range]]:
    """Runs of queries and the keys that some of them sees; the run that sees all comes first."""
    if mask is None:
        yield range(queries), range(keys)
        return
    runs = -(-mask.blocks // MOST_PIECES)
    for last in range(mask.blocks, 0, -runs):
        yield range(max(0, last - runs) * mask.queries, last * mask.queries), range(last * mask.keys)


def _keeps(mask: Mask, q_GQH: Tensor, k_GKH: Tensor) -> bool:
    """Whether attention weights are few enough to be kept."""
    scores = sum(len(rows) * len(columns) for rows, columns in _pieces(mask, q_GQH.shape[1], k_GKH.shape[1]))
    return len(q_GQH) * scores * q_GQH.element_size() <= KEPT


def _tiles(mask: Mask, q_GQH: Tensor, k_GKH: Tensor, kept: bool) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Heads, queries, keys, and the bias between the latter two: of a piece all at once where weights are kept, else so
    many heads and queries that their scores fit into a tile."""
    bias_QK = None if mask is None else _bias(mask, q_GQH.device, q_GQH.dtype)
    zero = q_GQH.new_zeros(1)
    for rows, columns in _pieces(mask, q_GQH.shape[1], k_GKH.shape[1]):
        heads = len(q_GQH) if kept else min(len(q_GQH), TILE_HEADS)
        step = len(rows) if kept else max(1, TILE // (heads * len(columns) * q_GQH.element_size()))
        for head in range(0, len(q_GQH), heads):
            for row in range(rows.start, rows.stop, step):
                part, seen = slice(row, min(row + step, rows.stop)), slice(0, columns.stop)
                yield slice(head, head + heads), part, seen, zero if bias_QK is None else bias_QK[part, seen]


class _Plain(torch.autograd.Function):
    """Batched products and a softmax; of many scores nothing is kept for the backward pass (as in arXiv 2205.14135), of few
    the attention weights."""

    @staticmethod
    def forward(ctx: Any, q_GQH: Tensor, k_GKH: Tensor, v_GKH: Tensor, mask: Mask, kept: bool) -> Tensor:
        out_GQH = torch.empty_like(q_GQH)
        weights = []
        for heads, rows, columns, bias in _tiles(mask, q_GQH, k_GKH, kept):
            weight = _weight(q_GQH[heads, rows], k_GKH[heads, columns], bias)
            out_GQH[heads, rows] = weight @ v_GKH[heads, columns]
            if kept:
                weights.append(weight)
        ctx.save_for_backward(q_GQH, k_GKH, v_GKH, *weights)
        ctx.mask, ctx.kept = mask, kept
        return out_GQH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_GQH: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q_GQH, k_GKH, v_GKH, *weights = ctx.saved_tensors
        scale = q_GQH.shape[-1] ** -0.5
        dq_GQH, dk_GKH, dv_GKH = torch.empty_like(q_GQH), torch.zeros_like(k_GKH), torch.zeros_like(v_GKH)
        for i, (heads, rows, columns, bias) in enumerate(_tiles(ctx.mask, q_GQH, k_GKH, ctx.kept)):
            q, k, v, g = q_GQH[heads, rows], k_GKH[heads, columns], v_GKH[heads, columns], g_GQH[heads, rows]
            weight = weights[i] if ctx.kept else _weight(q, k, bias)
            dv_GKH[heads, columns] += weight.transpose(1, 2) @ g
            d_scores = torch._softmax_backward_data(g @ v.transpose(1, 2), weight, -1, weight.dtype)
            dq_GQH[heads, rows] = (d_scores @ k).mul_(scale)
            dk_GKH[heads, columns] += (d_scores.transpose(1, 2) @ q).mul_(scale)
        return dq_GQH, dk_GKH, dv_GKH, None, None


def _weight(q_GQH: Tensor, k_GKH: Tensor, bias: Tensor) -> Tensor:
    bias = bias.expand(len(q_GQH), q_GQH.shape[1], k_GKH.shape[1])
    return torch.baddbmm(bias, q_GQH, k_GKH.transpose(1, 2), alpha=q_GQH.shape[-1] ** -0.5).softmax(-1)


def _plain(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """On a CPU the fastest."""
    q, k, v = (x.flatten(0, 1) for x in (q_BNQH, k_BNKH, v_BNKH))
    with torch.autocast(q.device.type, enabled=False):
        out = _Plain.apply(q, k, v, mask, True) if _keeps(mask, q, k) else _in_tiles(q, k, v, mask)
        return out.unflatten(0, q_BNQH.shape[:2])


@torch.compiler.disable  # a graph of hundreds of tiles would take minutes to compile
def _in_tiles(q_GQH: Tensor, k_GKH: Tensor, v_GKH: Tensor, mask: Mask) -> Tensor:
    return _Plain.apply(q_GQH, k_GKH, v_GKH, mask, False)


def _sdpa(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    bias = None if mask is None else _bias(mask, q_BNQH.device, q_BNQH.dtype)
    return F.scaled_dot_product_attention(q_BNQH, k_BNKH, v_BNKH, attn_mask=bias)


def _xformers(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    _needs_cuda("xformers", q_BNQH)
    from xformers.ops import memory_efficient_attention  # warns on machines without CUDA, so not at the top

    q, k, v = (x.transpose(1, 2) for x in (q_BNQH, k_BNKH, v_BNKH))
    bias = None
    if mask is not None:  # its kernels read the bias in rows that start at multiples of 8
        rows, columns = q.shape[1], k.shape[1]
        bias = q.new_zeros(rows, -(-columns // 8) * 8)[:, :columns]
        bias = bias.copy_(_bias(mask, q.device, q.dtype)).expand(len(q), q.shape[2], rows, columns)
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


def _flex(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    _needs_cuda("flex", q_BNQH)
    block_mask = None if mask is None else _flex_mask(mask, q_BNQH.device)
    # Encoder and decoder, training and evaluation, each batch size: more shapes than the few after which dynamo gives up.
    with torch._dynamo.config.patch(recompile_limit=64):
        return _compiled_flex()(q_BNQH, k_BNKH, v_BNKH, block_mask=block_mask)


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # without compilation it builds the whole score matrix


@functools.lru_cache(maxsize=64)
def _flex_mask(mask: BlockMask, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q // mask.queries >= k // mask.keys

    return create_block_mask(sees, None, None, mask.blocks * mask.queries, mask.blocks * mask.keys, device=str(device))


def _needs_cuda(name: str, x: Tensor) -> None:
    if x.device.type != "cuda":
        raise ValueError(f"attention {name} has kernels for CUDA only, not for {x.device.type}")


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask], Tensor]] = {
    "plain": _plain,
    "sdpa": _sdpa,
    "xformers": _xformers,
    "flex": _flex,
    "reference": reference,
}
"""q (B, N, Q, H), k and v (B, N, K, H), mask -> (B, N, Q, H). One that lacks a kernel for the tensors raises."""
