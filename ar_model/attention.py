"""Multi-head attention layer with rotary positions; `set_backend` chooses its kernel (see backends.py).

Legend: B batch, N heads, L tokens, M context tokens, Q queries, K keys, D width, H width of a head, A rotary angles (H / 2).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ar_model.attention_mask import Mask
from ar_model.backends import BACKENDS


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles (arXiv 2104.09864), each (B or 1, 1, L, A)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_angles(cls, angle_BLA: Tensor) -> "Rotation":
        return cls(angle_BLA.cos()[:, None], angle_BLA.sin()[:, None])

    def apply(self, x_BNLH: Tensor) -> Tensor:
        """Rotate the channel pairs (i, i + H / 2) of queries or keys."""
        cos, sin = self.cos.to(x_BNLH.dtype), self.sin.to(x_BNLH.dtype)
        a, b = x_BNLH.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Kernel(nn.Module):
    """Module without parameters that calls the selected backend. attention_trial.py registers forward pre-hooks on it."""

    backend = "sdpa"

    def forward(self, q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
        return BACKENDS[self.backend](q_BNQH, k_BNKH, v_BNKH, mask)


class Attention(nn.Module):
    """Multi-head self- or cross-attention. Raises a ValueError unless the heads have an equal, even number of channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} does not split into {heads} heads with an even number of channels each")
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
        """Return the output (B, L, D) for queries from `x` (B, L, D), and keys and values from `context` (B, M, D).

        Without `context`, `x` attends to itself. `rotation` and `context_rotation` are the rotary positions of `x` and `context`.
        """
        if context is None:
            context, context_rotation = x, rotation
        k, v = self.kv(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), k, v))
        if rotation is not None and context_rotation is not None:
            q, k = rotation.apply(q), context_rotation.apply(k)
        return self.out(self.kernel(q, k, v, mask).transpose(1, 2).flatten(2))


def set_backend(model: nn.Module, name: str) -> None:
    """Select the backend of every attention layer in the model. Raises a ValueError if `name` is not in BACKENDS."""
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")
    for module in model.modules():
        if isinstance(module, Kernel):
            module.backend = name
