"""`peak_memory` reports the peak of this process alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

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
