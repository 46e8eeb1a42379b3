"""A sweep that is stopped ends its training runs and probes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import ENVIRONMENT, ROOT

PROGRAM = """
import os, sys, time
from pathlib import Path
import torch
from pipelines.engine import signals, sweep

def sleep(file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)

def jobs(folder):
    # A job that ends by itself when it is asked to, a little later.
    code = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(143)))"
    code += "; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    sweep._command = lambda job, *_: [sys.executable, "-c", code, str(folder / job.name)]
    sweep.train([sweep.Job(name, folder / "runs" / name, 1, 0, []) for name in "ab"], None, torch.device("cpu"))

def probes(folder):
    sweep.run_in_parallel(sleep, [(str(folder / name),) for name in "ab"], torch.device("cpu"), "probes")

if __name__ == "__main__":
    try:
        with signals.StopSignals(lambda stop: None):
            globals()[sys.argv[1]](Path(sys.argv[2]))
    except signals.Stopped as stop:
        sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    "work, number",
    [
        ("jobs", signal.SIGTERM),
        pytest.param("probes", signal.SIGTERM, marks=pytest.mark.soak),
        # Jobs notice the end of their parent themselves: see test_signals.py.
        ("probes", signal.SIGKILL),
    ],
)
def test_a_stopped_sweep_leaves_no_process(work: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), work, str(tmp_path)]
    process = subprocess.Popen(command, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    while not ((tmp_path / "a").exists() and (tmp_path / "a").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert int((tmp_path / "a").read_text()) in [child.pid for child in started]
    process.send_signal(number)
    assert process.wait(30) == (143 if number == signal.SIGTERM else -number)
    _, alive = psutil.wait_procs(started, timeout=8)
    assert alive == []
