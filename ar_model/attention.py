"""Multi-head attention, rotary positions, and the choice of the kernel that computes it (backends.py).

Legend: B batch, N heads, L M tokens, Q queries, K keys, H width of a head, A rotary angles (H / 2).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ar_model.backends import BACKENDS, BlockMask, Mask

__all__ = ["CANNOT_RUN", "Attention", "BlockMask", "Mask", "Rotation", "Trial", "reason", "set_backend", "try_backends"]


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


CANNOT_RUN = (ImportError, NotImplementedError, ValueError, RuntimeError)
"""What a backend raises that is not installed, or has no kernel for a device, type or shape."""


def reason(error: Exception) -> str:
    """Why it does not run, in a line."""
    return " ".join(str(error).split())[:200]


class Call(NamedTuple):
    """What one layer asks of its kernel."""

    queries: torch.Size
    keys: torch.Size
    dtype: torch.dtype
    mask: Mask


@dataclass
class Trial:
    """Backends compared on the shapes of one forward pass."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Forward and backward of all attention of a step, by backend."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a backend does not run here."""

    @property
    def fastest(self) -> str:
        """Of those that are timed, which `reference` is not.

        Raises:
            ValueError: if none runs.
        """
        if not self.seconds:
            raise ValueError("no attention runs here: " + "; ".join(f"{k}: {v}" for k, v in self.failures.items()))
        return min(self.seconds, key=lambda name: self.seconds[name])


def try_backends(model: nn.Module, forward: Callable[[], object], names: list[str], laps: int = 4) -> Trial:
    """Time backends on the attention of `forward`, which runs once, with the backend that the model has.

    Each is tried by itself on random numbers of the same shapes, types and masks; what raises there is a failure. They take
    turns, and the fastest lap of each counts, so that other work on the machine falls on all of them.
    """
    with torch.no_grad(), _watched(model) as calls:
        forward()
    device = next(model.parameters()).device
    trial = Trial()
    best: dict[tuple[str, Call], float] = {}
    for lap in range(laps + 1):
        for name in [name for name in names if name not in trial.failures]:
            try:
                for call in calls:
                    seconds = _time(name, call, device)
                    if lap:  # the first does not count
                        best[name, call] = min(seconds, best.get((name, call), seconds))
            except CANNOT_RUN as error:
                trial.failures[name] = reason(error)
    for name in names:
        if name not in trial.failures:
            trial.seconds[name] = sum(count * best[name, call] for call, count in calls.items())
    return trial


@contextmanager
def _watched(model: nn.Module) -> Iterator[Counter[Call]]:
    calls: Counter[Call] = Counter()

    def see(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Mask]) -> None:
        q, k, _values, mask = inputs
        calls[Call(q.shape, k.shape, q.dtype, mask)] += 1

    hooks = [m.register_forward_pre_hook(see) for m in model.modules() if isinstance(m, Kernel)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _time(name: str, call: Call, device: torch.device) -> float:
    """Seconds of one call, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)  # the trial must not move the generator of the run
    sizes = (call.queries, call.keys, call.keys)
    q, k, v = (
        torch.randn(size, device=device, dtype=call.dtype, generator=generator).requires_grad_() for size in sizes
    )
    start = time.perf_counter()
    out = BACKENDS[name](q, k, v, call.mask)
    out.backward(torch.ones_like(out))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
