"""Request to end a training run: Ctrl-C, SIGTERM or SIGUSR1 take effect after a step, when a checkpoint can be saved."""

import signal
import threading
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator

from pipelines.engine.device import TIMEOUT
from pipelines.engine.signals import STOP_SIGNALS, Stopped, interrupt_is_ignored


class StopRequest:
    """Context in which a signal is noted and not raised. All ranks agree about the step after which they stop.

    A second Ctrl-C ends the run at once. With one rank, SIGTERM and SIGUSR1 before the end of the first step end the run at once,
    too, because there is nothing to save. After a signal, further SIGTERM and SIGUSR1 are ignored, also after the context.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """With several ranks, all of them must call this."""
        self._received = self._steps = 0
        self._several = accelerator.num_processes > 1
        # The flags of the ranks are reduced on the CPU: reading them from a GPU would wait for its work.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self._several else None
        self._flag, self._reduction = torch.zeros(1, dtype=torch.int64), None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            noted = STOP_SIGNALS if interrupt_is_ignored() else (*STOP_SIGNALS, signal.SIGINT)
            self._earlier = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        stop = self._received
        if error is None and self._several:
            # A rank may have got a signal after the last step, while a checkpoint was written.
            self._result()
            self._reduce()
            stop = self._result()
        for number, handler in self._earlier.items():
            if not stop or number == signal.SIGINT:
                signal.signal(number, handler)
        if error is None and stop:
            self.stop(stop)

    def _note(self, number: int, frame: object) -> None:
        first = not self._received
        self._received = self._received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._earlier[number])
        elif first and not self._steps and not self._several:
            self.stop(number)

    def after_step(self) -> int:
        """Return the number of the signal after which to save and stop now, the same on all ranks, or 0.

        With several ranks, this is what the ranks had received one step earlier, so that no rank waits for the others.
        """
        self._steps += 1
        if not self._several:
            return self._received
        agreed = self._result()
        self._reduce()
        return agreed

    def _reduce(self) -> None:
        """Begin to reduce the signals that the ranks have received. `_result` waits for the end."""
        self._flag = torch.tensor([self._received])
        self._reduction = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)

    def _result(self) -> int:
        if self._reduction is None:
            return 0
        self._reduction.wait()
        self._reduction = None
        return int(self._flag)

    def stop(self, number: int) -> NoReturn:
        """Raise KeyboardInterrupt or Stopped for a signal."""
        # Another rank may have received it.
        self._received = number
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
