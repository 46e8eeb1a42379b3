"""Measurement of the memory of this process."""

import re
import resource
import sys
import threading
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

    def _watch(self) -> None:
        while not self._over.wait(0.001):
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
