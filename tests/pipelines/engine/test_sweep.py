"""A sweep that is stopped ends its training runs and probes."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.forked import ENVIRONMENT, ROOT, Forked
from tests.helpers.process_ends import assert_end, wait_for

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
    sweep.train([sweep.Job(name, "", folder / "runs" / name, 1, 0, []) for name in "ab"], torch.device("cpu"))

def failing(folder):
    # The second job fails once the first one runs, which ends by itself when it is asked to.
    waits = "import signal, sys, time; saved = sys.argv[1] + '-saved'"
    waits += "; signal.signal(signal.SIGTERM, lambda *_: (open(saved, 'w'), sys.exit(143)))"
    waits += "; open(sys.argv[1], 'w').write('1'); time.sleep(60)"
    fails = "import os, sys, time\\nwhile not os.path.exists(sys.argv[2]): time.sleep(.02)\\nsys.exit('a mistake')"
    codes = {"a": waits, "b": fails}
    sweep._cores = lambda: [0, 0]
    sweep._command = lambda job, *_: [sys.executable, "-c", codes[job.name], str(folder / job.name), str(folder / "a")]
    sweep.train([sweep.Job(name, "", folder / "runs" / name, 1, 0, []) for name in "ab"], torch.device("cpu"))

def probes(folder):
    sweep.run_in_parallel(sleep, [(str(folder / name),) for name in "ab"], torch.device("cpu"), "probes")

if __name__ == "__main__":
    try:
        with signals.StopSignals(lambda stop: None):
            globals()[sys.argv[1]](Path(sys.argv[2]))
    except signals.Stopped as stop:
        sys.exit(stop.exit_code)
"""


def wait_for_file(file: Path) -> int:
    """Wait until a job or probe has written its process id; return it."""
    wait_for(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def test_sigterm_ends_the_jobs_and_waits_for_them(tmp_path: Path) -> None:
    process = Forked(["-c", PROGRAM, "jobs", str(tmp_path)], tmp_path, ENVIRONMENT)
    job = psutil.Process(wait_for_file(tmp_path / "a"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30).returncode == 143
    assert not job.is_running()


def test_the_failure_of_a_job_ends_the_others_and_is_reported_at_once(tmp_path: Path) -> None:
    result = Forked(["-c", PROGRAM, "failing", str(tmp_path)], tmp_path, ENVIRONMENT).wait(30)
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "ValueError: b, seed 0: a mistake"
    assert (tmp_path / "a-saved").exists()


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_sweep_leaves_no_probe(number: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), "probes", str(tmp_path)]
    process = subprocess.Popen(command, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    probe = wait_for_file(tmp_path / "a")
    started = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert probe in started
    process.send_signal(number)
    assert process.wait(30) == (143 if number == signal.SIGTERM else -number)
    assert_end(started)
