"""Child processes of multiprocessing that end with their parent, and only with it.

Slurm sends SIGTERM to all processes of a job, and a terminal sends SIGINT to all processes of a command. A parent that saves its
work after the signal still needs its children.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_ENDING = {signal.SIGTERM, signal.SIGUSR1}
"""Signals by which a parent may end a child."""
_BLOCKED = {signal.SIGINT, *_ENDING}
_SUPPORTED = hasattr(signal, "sigwaitinfo")
"""macOS does not tell who sent a signal. There, children keep the default handlers."""


@contextmanager
def shielded() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGUSR1 for processes that are started in this context. Each must call `end_with_parent`."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED) if _SUPPORTED else set()
    try:
        # When the tracker starts, it unblocks SIGINT and SIGTERM. Each start of a process calls this, too.
        resource_tracker.ensure_running()
        if _SUPPORTED:
            signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        yield
    finally:
        if _SUPPORTED:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def end_with_parent(*_: object) -> None:
    """End this child process when its parent dies, or when the parent terminates it. Arguments are ignored."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _SUPPORTED:
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)

    def wait_for_death() -> None:
        parent.join()
        os._exit(1)

    def wait_for_signal() -> None:
        while signal.sigwaitinfo(_ENDING).si_pid != parent.pid:
            pass
        os._exit(1)

    for wait in (wait_for_death, wait_for_signal) if _SUPPORTED else (wait_for_death,):
        threading.Thread(target=wait, daemon=True).start()
