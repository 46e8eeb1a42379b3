"""Several processes that a launcher or a command has started end with it, and save a checkpoint first."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipelines.engine.signals import STOP_SIGNALS
from tests.helpers.commands import ROOT, TINY_MODEL
from tests.helpers.forked import ENVIRONMENT, Forked
from tests.helpers.process_ends import wait_for
from tests.pipelines.engine.test_cpu_processes import launcher

STARTER = """
import signal, sys
from pipelines.engine import cpu_processes
from pipelines.engine.signals import StopSignals

cpu_processes._requested = lambda: {"num_processes": 2}
sys.orig_argv = ["python", "-c", sys.argv[1], sys.argv[2]]
sys.argv[0] = "a_command.py"
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with StopSignals(lambda stop: None):
        cpu_processes.start_cpu_processes()
except KeyboardInterrupt:
    sys.exit(130)
"""
"""Command of two processes, each with the code and the folder in its arguments."""

WAITING = """
import os, signal, sys, time
from pathlib import Path

rank, folder = os.environ["RANK"], Path(sys.argv[1])

def end(number, _):
    # The first process ends later than the second one.
    time.sleep(1 - int(rank))
    (folder / f"ended{rank}").touch()
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
# Ctrl-C in a terminal does not reach it a second time.
assert os.getpgrp() == os.getpid()
(folder / rank).write_text(os.environ["ARVIDEO_PARENT"])
time.sleep(60)
"""


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGINT])
def test_a_signal_is_passed_on_and_all_processes_are_waited_for(number: int, tmp_path: Path) -> None:
    process = Forked(["-c", STARTER, WAITING, str(tmp_path)], tmp_path, ENVIRONMENT)
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert process.alive
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30).returncode == 128 + number
    assert (tmp_path / "ended0").exists() and (tmp_path / "ended1").exists()


BUSY = """
import os, signal, sys, time
from pathlib import Path

file = Path(sys.argv[1], os.environ["RANK"])
signal.signal(signal.SIGINT, lambda *_: file.write_text("interrupted"))
file.write_text("ready")
time.sleep(60)
"""


def test_a_second_ctrl_c_ends_all_processes_at_once(tmp_path: Path) -> None:
    process = Forked(["-c", STARTER, BUSY, str(tmp_path)], tmp_path, ENVIRONMENT)
    files = [tmp_path / rank for rank in "01"]
    for state in ("ready", "interrupted"):
        wait_for(lambda state=state: all(file.exists() and file.read_text() == state for file in files))
        process.send_signal(signal.SIGINT)
    result = process.wait(30)
    assert (result.returncode, result.stderr) == (130, "")


FAILING = """
import os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1])

def end(number, _):
    (folder / "stopped").touch()
    sys.exit(128 + number)

if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, end)
    (folder / "waits").touch()
    time.sleep(60)
# The second process fails once the first one waits.
while not (folder / "waits").exists():
    time.sleep(0.02)
"""


@pytest.mark.parametrize(
    "failure, code, facts",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ["a_command", "rank 1", "SIGKILL"]),
        ("sys.exit(3)", 3, []),
    ],
)
def test_after_the_death_of_a_process_the_others_are_killed(
    failure: str, code: int, facts: list[str], tmp_path: Path
) -> None:
    result = Forked(["-c", STARTER, FAILING + failure, str(tmp_path)], tmp_path, ENVIRONMENT).wait(30)
    assert result.returncode == code
    lines = result.stderr.splitlines()
    assert len(lines) == bool(facts) and all(fact in line for line in lines for fact in facts)
    assert not (tmp_path / "stopped").exists()


def gpu_launcher() -> list[str]:
    return [*[word for word in launcher() if word != "--cpu"], "--multi_gpu"]


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
@pytest.mark.parametrize("launch", [launcher, gpu_launcher])
def test_processes_save_a_checkpoint_when_their_launcher_ends(
    launch: object, number: int, finished_project: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    many = ["--steps", "20000", "--save_every", "20000", "--validate_every", "20000", "--out", str(run)]
    command = [*launch(), str(ROOT / "pipelines" / "pretrain_ar.py"), *TINY_MODEL, *many]  # type: ignore[operator]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    with open(tmp_path / "stderr", "w") as errors:
        process = subprocess.Popen(command, cwd=finished_project, env=environment, stderr=errors)
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) != 0
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == [] and time.monotonic() - began < 30
    (line,) = [line for line in (tmp_path / "stderr").read_text().splitlines() if "pretrain_ar: error: " in line]
    assert "stopped by SIGTERM" in line
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) >= 10
