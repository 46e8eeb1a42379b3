"""`peak_memory` reports the peak of this process alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipelines.engine.memory import peak_memory, peak_of, reset_peak_memory

ROOT = Path(__file__).parents[3]
CHILD = "import torch; from pipelines.engine.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
STATUS = Path("/proc/self/status")


@pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(),
    reason="without VmHWM the value includes the peak of the parent",
)
def test_peak_memory_is_of_the_process_alone() -> None:
    # 1 GiB that the child does not have.
    held = np.ones(2**27)
    ours = psutil.Process().memory_info().rss
    result = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**24 < int(result.stdout) < ours - held.nbytes // 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system cannot reset the peak of a process")
def test_the_peak_before_a_reset_does_not_count() -> None:
    cpu = torch.device("cpu")
    large = np.ones(2**26)
    assert peak_memory(cpu) > large.nbytes
    before = peak_memory(cpu)
    del large
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < before - 2**28


def test_the_peak_of_a_call_is_beyond_what_was_in_use() -> None:
    held = np.ones(2**26)
    peak = peak_of(lambda: np.ones(2**25), torch.device("cpu"))
    assert 2**27 < peak < 2**28 + 2**26 < held.nbytes
