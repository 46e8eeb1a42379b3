"""Signals that end a command: it saves what it can and exits with 128 + number.

SIGTERM and SIGUSR1, which Slurm, `docker stop` and launchers send, raise `Stopped` in the main thread. Ctrl-C (SIGINT) raises
KeyboardInterrupt. During training, both are raised after the current step (stop_request.py). Further SIGTERM and SIGUSR1 are
ignored, and a further Ctrl-C ends the process at once. Only the standard library is imported here, because commands install the
handlers before they import torch.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 25.0
"""Seconds from a signal to the end of the process, even if the main thread waits for another process."""
_POLL = 0.5
_PARENT = "ARVIDEO_PARENT"
"""Environment variable: process id of the command that started this one and waits for it."""
_LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch", "deepspeed", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.launch", "torch.distributed.run"),
}
_busy: list[None] = []


class Stopped(BaseException):
    """The end of a command by a signal. Raised like KeyboardInterrupt, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {self.signal.name}")


class StopSignals:
    """Context in which the first SIGTERM or SIGUSR1 raises `Stopped`, and ends the process after `PATIENCE` at the latest.

    The first Ctrl-C raises KeyboardInterrupt. After one of them, further SIGTERM and SIGUSR1 are ignored, also after the
    context, and Ctrl-C ends the process at once. A SIGINT that was ignored before stays ignored. Leaving the context does not
    stop the clock of `PATIENCE`. Outside the main thread, the context does nothing.

    Attributes:
        stop: The first SIGTERM or SIGUSR1; None before it.
    """

    def __init__(self, before_exit: Callable[[Stopped], Any]) -> None:
        """`before_exit` is called before the process is ended by its second Ctrl-C, or because its patience is over."""
        self.stop: Stopped | None = None
        self._before_exit = before_exit
        self._raised = False
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignals":
        if self._active:
            self._receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            # A thread reads the numbers of signals, because the main thread may wait in C for another process.
            self._earlier_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
            self._earlier = {number: signal.signal(number, self._raise) for number in STOP_SIGNALS}
            if not interrupt_is_ignored():
                self._earlier[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not self._active:
            return
        after: dict[signal.Signals, Any]
        if self.stop or isinstance(error, (KeyboardInterrupt, Stopped)):
            # The interpreter, which now ends, would reset handlers of its own to those of the system.
            after = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN) | {signal.SIGINT: signal.SIG_DFL}
        else:
            after = self._earlier
        for number in self._earlier:
            signal.signal(number, after[number])
        signal.set_wakeup_fd(self._earlier_fd)
        if self.stop is None:
            # Ends the thread.
            self._sender.close()

    def _raise(self, number: int, frame: object) -> None:
        if not self._raised:
            self._raised = True
            self.stop = self.stop or Stopped(number)
            raise self.stop

    def _interrupt(self, number: int, frame: object) -> None:
        if self._raised:
            stop = self.stop or Stopped(number)
            self._before_exit(stop)
            os._exit(stop.exit_code)
        self._raised = True
        raise KeyboardInterrupt

    def _watch(self) -> None:
        # The receiver stays open: Python writes the numbers of further signals, too.
        while numbers := self._receiver.recv(1):
            if numbers[0] in STOP_SIGNALS:
                break
        else:
            self._receiver.close()
            return
        self.stop = self.stop or Stopped(numbers[0])
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(0.1)
            if _busy:
                end = time.monotonic() + PATIENCE
        self._before_exit(self.stop)
        os._exit(self.stop.exit_code)


@contextmanager
def no_deadline() -> Iterator[None]:
    """Context that may take longer: a training step, the writing of a checkpoint, a wait for processes with deadlines.

    Contexts may be nested, and entered in several threads.
    """
    # Appending to a list and removing from it are atomic.
    _busy.append(None)
    try:
        yield
    finally:
        _busy.pop()


def interrupt_is_ignored() -> bool:
    """Return whether Ctrl-C is ignored. A shell starts background jobs so: Ctrl-C is meant for the one in the foreground."""
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def exit_code(code: int) -> int:
    """Return the exit code of a finished process; 128 + number if a signal ended it."""
    return 128 - code if code < 0 else code


def child_environment() -> dict[str, str]:
    """Return the environment for a command that this process starts, so that `stop_with_parent` works there."""
    return {**os.environ, _PARENT: str(os.getpid())}


def stop_with_parent() -> None:
    """Send SIGTERM to this process once the process that waits for it has died, which was killed or ended by a signal.

    Such a process is another command, or a launcher. The end of any other parent, such as a shell, means nothing.
    """
    parent = _waiting_parent()
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _waiting_parent() -> int | None:
    import psutil

    # Removed, because a process that this one starts has another parent.
    named = os.environ.pop(_PARENT, "")
    # Between the two there may be a launcher, which is then the parent.
    if named and (int(named) == os.getppid() or not psutil.pid_exists(int(named))):
        return int(named)
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline()[:4] if parent else []
    except psutil.Error:
        return None
    return parent.pid if parent and any(Path(word).name in _LAUNCHERS for word in words) else None
