"""One description of who may see whom, one adapter per kernel, one dense reference that all are tested against.

Legend: B batch, N heads, Q queries, K keys, H width of a head.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


@functools.lru_cache(maxsize=32)
def _bias(mask: BlockMask, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mask as a number to add to the scores, (Q, K)."""
    with torch.inference_mode(False):  # what is kept must serve training too
        hidden = ~mask.visible(device)
        return torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _plain(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """Two batched products and a softmax: on a CPU the fastest up to about a thousand tokens."""
    q, k, v = (x.flatten(0, 1) for x in (q_BNQH, k_BNKH, v_BNKH))
    bias = q.new_zeros(1) if mask is None else _bias(mask, q.device, q.dtype)
    scores = torch.baddbmm(bias.expand(len(q), q.shape[1], k.shape[1]), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1).to(v.dtype) @ v).unflatten(0, q_BNQH.shape[:2])


def _sdpa(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    bias = None if mask is None else _bias(mask, q_BNQH.device, q_BNQH.dtype)
    return F.scaled_dot_product_attention(q_BNQH, k_BNKH, v_BNKH, attn_mask=bias)


def _xformers(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    if q_BNQH.device.type != "cuda":
        raise ValueError("attention xformers has kernels for CUDA only")
    from xformers.ops import memory_efficient_attention  # warns on machines without CUDA, so not at the top

    q, k, v = (x.transpose(1, 2) for x in (q_BNQH, k_BNKH, v_BNKH))
    bias = None
    if mask is not None:  # its kernels read the bias in rows that start at multiples of 8
        rows, columns = q.shape[1], k.shape[1]
        bias = q.new_zeros(rows, -(-columns // 8) * 8)[:, :columns]
        bias = bias.copy_(_bias(mask, q.device, q.dtype)).expand(len(q), q.shape[2], rows, columns)
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask], Tensor]] = {
    "plain": _plain,
    "sdpa": _sdpa,
    "xformers": _xformers,
}


class Rotation(NamedTuple):
    """Rotary positions (arXiv 2104.09864): cosine and sine of an angle per pair of channels, (B or 1, 1, L, H / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angle_BLA: Tensor) -> "Rotation":
        return cls(angle_BLA.cos()[:, None], angle_BLA.sin()[:, None])

    def apply(self, x_BNLH: Tensor) -> Tensor:
        """Turn the pairs (i, i + H / 2) of channels."""
        cos, sin = self.cos.to(x_BNLH.dtype), self.sin.to(x_BNLH.dtype)
        a, b = x_BNLH.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of `x` (B, L, D) to `context` (B, M, D), or to itself; rotations carry their positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not give {heads} heads an even number of channels each")
        self.heads = heads
        self.backend = "sdpa"
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Mask = None,
        rotation: Rotation | None = None,
        context_rotation: Rotation | None = None,
    ) -> Tensor:
        if context is None:
            context, context_rotation = x, rotation
        k, v = self.kv(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), k, v))
        if rotation is not None and context_rotation is not None:
            q, k = rotation.apply(q), context_rotation.apply(k)
        return self.out(BACKENDS[self.backend](q, k, v, mask).transpose(1, 2).flatten(2))


def set_backend(model: nn.Module, name: str) -> None:
    """Let every attention layer inside the model use one backend.

    Raises:
        ValueError: for a name that does not exist.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is none of {', '.join(BACKENDS)}")
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = name


def fastest_backend(model: nn.Module, step: Callable[[], Tensor], device: torch.device) -> str:
    """Time forward and backward of `step` (returns a loss) with every backend that runs here; the model keeps the fastest.

    Gradients are dropped.
    """
    seconds: dict[str, float] = {}
    failure: Exception | None = None
    for name in BACKENDS if device.type == "cuda" else ("plain", "sdpa"):
        set_backend(model, name)
        try:
            laps = [_lap(step, device) for _ in range(4)]
        except (ImportError, NotImplementedError, ValueError, RuntimeError) as error:
            failure = error  # not installed, or without a kernel for this device and type
            continue
        finally:
            model.zero_grad(set_to_none=True)
        seconds[name] = min(laps[1:])
    if not seconds and failure is not None:
        raise failure
    fastest = min(seconds, key=lambda name: seconds[name])
    set_backend(model, fastest)
    return fastest


def _lap(step: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
