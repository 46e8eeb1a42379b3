"""The memory of a process, watched from within."""

import re
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

_STATUS = Path("/proc/self/status")
"""What Linux says of this process."""


class Resident:
    """Within, a thread looks every millisecond how many bytes of the process are resident."""

    def __enter__(self) -> "Resident":
        self._over, self._process = threading.Event(), psutil.Process()
        self.before = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, self._process.memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    own = re.search(r"VmHWM:\s+(\d+)", _STATUS.read_text()) if _STATUS.exists() else None
    if own:  # getrusage tells a process also of what the one that started it had
        return 1024 * int(own[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
