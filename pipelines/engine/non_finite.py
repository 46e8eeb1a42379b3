"""Stop of a training run at the first gradient that is not finite, without waiting for the GPU in every step."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

DELAYED_ON = {"cuda"}
"""Device types on which the result of a step is read while the next step runs."""


class NonFiniteGuard:
    """Blocks all updates of an optimizer from the first step whose gradient is not finite, and then raises.

    The device itself blocks them: a fused optimizer skips an update if its `found_inf` is 1 (made for gradient scaling). On a GPU
    the host reads the result one step later, so that it does not wait for the GPU. On a CPU it reads the result at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._found_inf = torch.zeros((), device=device)
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Callable[[], str]]] = deque()

    def before_update(self, norms: Tensor, message: Callable[[], str]) -> None:
        """Block the update if a gradient norm of this step is not finite, or was not in an earlier step.

        Raises:
            FloatingPointError: with the message of the first such step, if its result has arrived.
        """
        self._found_inf = torch.maximum(self._found_inf, (~norms.isfinite()).any().to(self._found_inf.dtype))
        self._optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        event = None
        # A copy to the CPU that does not block goes to pinned memory; the event tells when it has arrived.
        host = self._found_inf.to("cpu", non_blocking=True)
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._pending.append((host, event, message))
        self._read(keep=1 if self._device.type in DELAYED_ON else 0)

    def check(self) -> None:
        """Wait for the results of all steps. Raises FloatingPointError like `before_update`; call it before anything is kept."""
        self._read(keep=0)

    def _read(self, keep: int) -> None:
        while len(self._pending) > keep:
            host, event, message = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if host.item():
                raise FloatingPointError(message())
