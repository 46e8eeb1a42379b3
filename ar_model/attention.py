"""Multi-head attention, rotary positions, and the choice of the kernel that computes it (backends.py).

Legend: B batch, N heads, L M tokens, Q queries, K keys, H width of a head, A rotary angles (H / 2).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ar_model.backends import BACKENDS, Mask


class Rotation(NamedTuple):
    """Rotary positions (arXiv 2104.09864): cosine and sine of an angle per pair of channels, (B or 1, 1, L, H / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angle_BLA: Tensor) -> "Rotation":
        return cls(angle_BLA.cos()[:, None], angle_BLA.sin()[:, None])

    @classmethod
    def joined(cls, first: "Rotation", second: "Rotation") -> "Rotation":
        """Those of two runs of tokens, one behind the other."""
        return cls(*(torch.cat(pair, dim=2) for pair in zip(first, second, strict=True)))

    def apply(self, x_BNLH: Tensor) -> Tensor:
        """Turn the pairs (i, i + H / 2) of channels."""
        cos, sin = self.cos.to(x_BNLH.dtype), self.sin.to(x_BNLH.dtype)
        a, b = x_BNLH.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Kernel(nn.Module):
    """The backend that a layer uses; without parameters, a module so that a trial can see what passes through it."""

    backend = "sdpa"

    def forward(self, q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
        return BACKENDS[self.backend](q_BNQH, k_BNKH, v_BNKH, mask)


class Attention(nn.Module):
    """Multi-head attention of `x` (B, L, D) to `context` (B, M, D), or to itself; rotations carry their positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not give {heads} heads an even number of channels each")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.kernel = Kernel()
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
        return self.out(self.kernel(q, k, v, mask).transpose(1, 2).flatten(2))


def set_backend(model: nn.Module, name: str) -> None:
    """Let every attention layer inside the model use one backend.

    Raises:
        ValueError: for a name that does not exist.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is none of {', '.join(BACKENDS)}")
    for module in model.modules():
        if isinstance(module, Kernel):
            module.backend = name
