"""A trial of attention kernels: which is the fastest on the shapes of one forward pass.

Legend: B batch, N heads, Q queries, K keys, H width of a head.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ar_model.attention import Kernel
from ar_model.backends import BACKENDS, Mask

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
