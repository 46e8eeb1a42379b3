"""Attention kernels: one adapter per kernel, and a dense reference.

Legend: B batch, N heads, Q queries, K keys, H width of a head, G = B * N.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ar_model import cuda_backends
from ar_model.attention_mask import Mask, bias_of


def reference(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """Compute attention by its definition, in fp32. Tests compare all other backends with it."""
    scores = (q_BNQH.float() / math.sqrt(q_BNQH.shape[-1])) @ k_BNKH.float().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask.visible(scores.device), -torch.inf)
    return (scores.softmax(-1) @ v_BNKH.float()).to(v_BNKH.dtype)


MAX_PIECES = 4
"""Plain attention splits the queries into at most this many pieces, and skips the keys that no query of a piece sees. Four
pieces leave 10/16 of the scores of a triangular mask."""
MAX_SAVED_BYTES = 32 * 2**20
"""Plain attention saves the weights of a layer for the backward pass up to this size. Larger weights are recomputed."""
GPU_FACTOR = 64
"""Factor of these sizes on a GPU, which has more memory than the cache of a CPU and is slow in small matrix products."""
TILE_BYTES, TILE_HEADS = 4 * 2**20, 4
"""Bytes of weights, and number of heads, of one tile when weights are recomputed. A tile fits into the cache of a CPU."""
SCORE_BYTES = 2**20
"""Bytes of scores that are in memory at once. Scores are in fp32: rounded to bf16, scores of standard deviation 8 give four times
the error in the gradient of the queries."""


def _size_factor(x: Tensor) -> int:
    return GPU_FACTOR if x.device.type == "cuda" else 1


def _pieces(mask: Mask, queries: int, keys: int) -> Iterator[tuple[range, range]]:
    """Yield ranges of queries, the last first, each with the range of keys that at least one of its queries sees."""
    if mask is None:
        yield range(queries), range(keys)
        return
    blocks = math.ceil(mask.blocks / MAX_PIECES)
    for last in range(mask.blocks, 0, -blocks):
        yield range(max(0, last - blocks) * mask.queries, last * mask.queries), range(last * mask.keys)


def _tiles(mask: Mask, q_GQH: Tensor, k_GKH: Tensor, save: bool) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Yield slices of heads, queries and keys, with their bias: whole pieces if weights are saved, else smaller tiles."""
    bias_QK = None if mask is None else bias_of(mask, q_GQH.device, torch.float32)
    zero, factor = q_GQH.new_zeros(1, dtype=torch.float32), _size_factor(q_GQH)
    for rows, columns in _pieces(mask, q_GQH.shape[1], k_GKH.shape[1]):
        heads = len(q_GQH) if save else min(len(q_GQH), factor * TILE_HEADS)
        step = len(rows) if save else max(1, factor * TILE_BYTES // (heads * len(columns) * q_GQH.element_size()))
        for head in range(0, len(q_GQH), heads):
            for row in range(rows.start, rows.stop, step):
                queries, keys = slice(row, min(row + step, rows.stop)), slice(0, columns.stop)
                bias = zero if bias_QK is None else bias_QK[queries, keys]
                yield slice(head, head + heads), queries, keys, bias


class _Plain(torch.autograd.Function):
    """Attention as batched matrix products and a softmax. Backward uses saved weights or recomputes them (arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx: Any, q_GQH: Tensor, k_GKH: Tensor, v_GKH: Tensor, mask: Mask, save: bool) -> Tensor:
        out_GQH = torch.empty_like(q_GQH)
        weights = []
        for heads, rows, columns, bias in _tiles(mask, q_GQH, k_GKH, save):
            weight = _weight(q_GQH[heads, rows], k_GKH[heads, columns], bias)
            out_GQH[heads, rows] = weight @ v_GKH[heads, columns]
            if save:
                weights.append(weight)
        ctx.save_for_backward(q_GQH, k_GKH, v_GKH, *weights)
        ctx.mask, ctx.save = mask, save
        return out_GQH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_GQH: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q_GQH, k_GKH, v_GKH, *weights = ctx.saved_tensors
        scale = q_GQH.shape[-1] ** -0.5
        dq_GQH, dk_GKH, dv_GKH = torch.empty_like(q_GQH), torch.zeros_like(k_GKH), torch.zeros_like(v_GKH)
        for i, (heads, rows, columns, bias) in enumerate(_tiles(ctx.mask, q_GQH, k_GKH, ctx.save)):
            q, k, v, g = q_GQH[heads, rows], k_GKH[heads, columns], v_GKH[heads, columns], g_GQH[heads, rows]
            weight = weights[i] if ctx.save else _weight(q, k, bias)
            dv_GKH[heads, columns] += weight.transpose(1, 2) @ g
            d_scores = torch._softmax_backward_data(g @ v.transpose(1, 2), weight, -1, weight.dtype)
            dq_GQH[heads, rows] = (d_scores @ k).mul_(scale)
            dk_GKH[heads, columns] += (d_scores.transpose(1, 2) @ q).mul_(scale)
        return dq_GQH, dk_GKH, dv_GKH, None, None


def _weight(q_GQH: Tensor, k_GKH: Tensor, bias: Tensor) -> Tensor:
    """Return the attention weights (G, Q, K), from scores and a softmax in fp32, some heads at a time."""
    count, queries, keys = len(q_GQH), q_GQH.shape[1], k_GKH.shape[1]
    weight = q_GQH.new_empty(count, queries, keys)
    # Compiled code needs no chunks, and a graph of many chunks would take minutes to compile.
    compiling = torch.compiler.is_compiling()
    heads = count if compiling else max(1, _size_factor(q_GQH) * SCORE_BYTES // (4 * queries * keys))
    for head in range(0, count, heads):
        chunk = slice(head, head + heads)
        q, k = q_GQH[chunk].float(), k_GKH[chunk].float().transpose(1, 2)
        scores = torch.baddbmm(bias.expand(len(q), queries, keys), q, k, alpha=q.shape[-1] ** -0.5)
        weight[chunk] = scores.softmax(-1)
    return weight


def _plain(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """Compute attention with plain matrix products: the fastest backend on CPUs."""
    q, k, v = (x.flatten(0, 1) for x in (q_BNQH, k_BNKH, v_BNKH))
    scores = sum(len(rows) * len(columns) for rows, columns in _pieces(mask, q.shape[1], k.shape[1]))
    save = len(q) * scores * q.element_size() <= MAX_SAVED_BYTES * _size_factor(q)
    with torch.autocast(q.device.type, enabled=False):
        out = _Plain.apply(q, k, v, mask, True) if save else _plain_in_tiles(q, k, v, mask)
        return out.unflatten(0, q_BNQH.shape[:2])


# A graph of hundreds of tiles would take minutes to compile.
@torch.compiler.disable
def _plain_in_tiles(q_GQH: Tensor, k_GKH: Tensor, v_GKH: Tensor, mask: Mask) -> Tensor:
    return _Plain.apply(q_GQH, k_GKH, v_GKH, mask, False)


def _sdpa(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    if mask is None or mask.causal:
        # Without a bias PyTorch can use flash attention.
        return F.scaled_dot_product_attention(q_BNQH, k_BNKH, v_BNKH, is_causal=mask is not None)
    return F.scaled_dot_product_attention(q_BNQH, k_BNKH, v_BNKH, attn_mask=bias_of(mask, q_BNQH.device, q_BNQH.dtype))


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask], Tensor]]
BACKENDS = {
    "plain": _plain,
    "sdpa": _sdpa,
    "xformers": cuda_backends.xformers,
    "flex": cuda_backends.flex,
    "reference": reference,
}
"""Name -> function that maps q (B, N, Q, H), k and v (B, N, K, H) and a mask to the output (B, N, Q, H). A backend without a
kernel for the tensors raises an error, of a type that depends on the library."""
