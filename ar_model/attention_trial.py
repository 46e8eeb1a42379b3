"""Find the fastest attention kernel for the shapes of one forward pass.

Legend: B batch, N heads, Q queries, K keys, H width of a head.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ar_model.attention import Kernel
from ar_model.attention_mask import Mask
from ar_model.backends import BACKENDS


def reason(error: Exception) -> str:
    """Return the message of an error as one line of at most 2,000 characters.

    A refusal of xformers lists the inputs first, and then the reason of each operator. The inputs are left out.
    """
    lines = str(error).splitlines()
    first = next((i for i, line in enumerate(lines) if "is not supported because" in line), 0)
    message = " ".join(" ".join(lines[first:]).split())[:2000]
    # The message of other types, such as AttributeError, says little without the type.
    return message if message and isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {message}"


class Call(NamedTuple):
    """Shapes, dtype and mask of one call of a kernel. Equal calls are timed once."""

    queries: torch.Size
    keys: torch.Size
    dtype: torch.dtype
    mask: Mask


class Trial(NamedTuple):
    """Result of timing several backends on the shapes of one forward pass."""

    seconds: dict[str, float]
    """Backend -> seconds of all attention calls of a step, forward and backward."""
    failures: dict[str, str]
    """Backend -> error that the backend raises."""

    @property
    def fastest(self) -> str:
        """Name of the fastest backend. Raises a ValueError if no backend runs."""
        if not self.seconds:
            failures = "; ".join(f"{name}: {failure}" for name, failure in self.failures.items())
            raise ValueError(f"no attention backend runs here: {failures}")
        return min(self.seconds, key=lambda name: self.seconds[name])


def try_backends(model: nn.Module, forward: Callable[[], object], names: list[str], laps: int = 4) -> Trial:
    """Time backends on the attention calls of `forward`, which runs once with the model's current backend."""
    calls: Counter[Call] = Counter()

    def record(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Mask]) -> None:
        q, k, _values, mask = inputs
        calls[Call(q.shape, k.shape, q.dtype, mask)] += 1

    with torch.no_grad(), ExitStack() as hooks:
        for kernel in (module for module in model.modules() if isinstance(module, Kernel)):
            hooks.enter_context(kernel.register_forward_pre_hook(record))
        forward()
    return time_backends(calls, next(model.parameters()).device, names, laps)


def time_backends(calls: Counter[Call], device: torch.device, names: list[str], laps: int = 4) -> Trial:
    """Time backends on random tensors with the shapes, dtypes and masks of some calls, each as often as `calls` counts it.

    Backends take turns and the fastest lap of each counts, so that other load on the machine affects all equally.
    """
    failures: dict[str, str] = {}
    best: dict[tuple[str, Call], float] = {}
    for lap in range(laps + 1):
        for name in [name for name in names if name not in failures]:
            try:
                for call in calls:
                    elapsed = _time(name, call, device)
                    # Lap 0 is a warm-up: some kernels are compiled in it.
                    if lap > 0:
                        best[name, call] = min(elapsed, best.get((name, call), elapsed))
            # A broken installation of a kernel's library raises many types of errors, AttributeError and AssertionError too.
            except Exception as error:
                failures[name] = reason(error)
    working = [name for name in names if name not in failures]
    seconds = {name: sum(count * best[name, call] for call, count in calls.items()) for name in working}
    return Trial(seconds, failures)


def _time(name: str, call: Call, device: torch.device) -> float:
    """Return the seconds of one call, forward and backward."""
    # A separate generator, because the trial must not advance the random state of the run.
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(size, device=device, dtype=call.dtype, generator=generator).requires_grad_()
        for size in (call.queries, call.keys, call.keys)
    )
    # On a GPU several calls are in flight, as in a training step.
    cuda, repeats = device.type == "cuda", 5 if device.type == "cuda" else 1
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        out = BACKENDS[name](q, k, v, call.mask)
        out.backward(torch.ones_like(out))
    if cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats
