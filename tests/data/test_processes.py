"""Loading processes end with the training process, however it ends, and not by signals that all processes of a job get."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.process_ends import assert_end

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
from data.loading import batches
from torch.utils.data import Dataset
import numpy as np

class Numbers(Dataset):
    def __getitem__(self, step):
        return {"row_B": np.full(4, step)}

if __name__ == "__main__":
    loaded = batches(Numbers(), range(10_000), workers=2)
    assert next(loaded)["row_B"][0] == 0
    print("ready", flush=True)
    for line in sys.stdin:
        # Ctrl-C in a terminal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.killpg(os.getpgrp(), signal.SIGINT)
        for _ in range(20):
            batch = next(loaded)
        print(batch["row_B"][0].item(), flush=True)
"""


@pytest.fixture
def loading(tmp_path: Path) -> subprocess.Popen[str]:
    """Process, in a session of its own, that loads 20 batches with two workers for each line of its stdin."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    assert len(found) >= 3, "a fork server and two workers"
    return found


def test_workers_ignore_ctrl_c_and_the_signals_of_a_job_and_end_with_the_training_process(
    loading: subprocess.Popen[str],
) -> None:
    assert loading.stdin is not None and loading.stdout is not None
    workers = children(loading)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for worker in workers:
            worker.send_signal(number)
    time.sleep(0.3)
    for done in (20, 40):
        loading.stdin.write("\n")
        loading.stdin.flush()
        assert int(loading.stdout.readline()) == done
    loading.kill()
    loading.wait()
    assert_end(worker.pid for worker in workers)
