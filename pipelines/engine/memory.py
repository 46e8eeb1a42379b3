"""Measurement of the memory of this process."""

import ctypes
import re
import resource
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch


class Resident:
    """Context in which a thread samples the resident memory of the process every millisecond.

    `before` is the memory at the start of the context, `most` the peak, both in bytes.
    """

    def __enter__(self) -> "Resident":
        self._over, self._process = threading.Event(), psutil.Process()
        self.before = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self._sample()

    def _sample(self) -> None:
        self.most = max(self.most, self._process.memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux, getrusage would include the peak of the parent process.
    status = Path("/proc/self/status")
    if status.exists() and (own := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return 1024 * int(own[1])
    # macOS reports bytes, other systems KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, so that `peak_memory` reports the peak from here on; some systems cannot do this for a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            # 5 resets VmHWM (man proc_pid_clear_refs).
            Path("/proc/self/clear_refs").write_text("5")


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory in bytes of a call, beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # Make the C library return freed memory to the operating system, so that it does not count as in use.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with Resident() as resident:
        # On a busy machine, the thread may not run during a short call. The result exists until the last sample.
        result = call()
    del result
    return resident.most - resident.before
