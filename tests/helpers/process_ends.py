"""Waiting for events of other processes, with a limit in time."""

import time
from collections.abc import Callable, Iterable

import psutil


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: int) -> bool:
    """Return whether a process has ended, even if its parent has not read its exit code."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_end(processes: Iterable[int], seconds: float = 10) -> None:
    """Assert that processes end within some seconds, which a killed process and its children may need."""
    for process in processes:
        wait_for(lambda process=process: ended(process), seconds)  # type: ignore[misc]
