"""SIGTERM and SIGUSR1 end a process once, soon and with an exit code; a process ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.engine.signals import STOP_SIGNALS, Stopped, StopSignals, child_environment, exit_code
from tests.helpers.commands import ROOT
from tests.helpers.process_ends import assert_end, ended, wait_for

HEAD = """\
import os, signal, subprocess, sys, time
from pathlib import Path
from pipelines.engine import signals
from pipelines.engine.signals import StopSignals, Stopped, child_environment, stop_with_parent
"""


def begin(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program that imports the module, and wait until it prints a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


WAITING = """
    with StopSignals(lambda stop: print("at once:", stop, flush=True)):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            time.sleep(0.5)
            print("cleaned", flush=True)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_raised_once_and_cleaning_up_is_not_disturbed(number: int) -> None:
    stopped = "except Stopped as stop:\n    print(stop)\n    sys.exit(stop.exit_code)\n"
    process = begin(f"try:{WAITING}{stopped}")
    process.send_signal(number)
    assert process.stdout is not None and process.stdout.readline() == "cleaning\n"
    for again in STOP_SIGNALS:
        process.send_signal(again)
    out, errors = process.communicate(timeout=20)
    assert (out.splitlines(), errors) == (["cleaned", f"stopped by {signal.Signals(number).name}"], "")
    assert process.returncode == 128 + number == {signal.SIGTERM: 143, signal.SIGUSR1: 138}[number]


INTERRUPTED = f"""
signal.signal(signal.SIGINT, signal.default_int_handler)
class AtTheEnd:
    \"""Sends SIGTERM when the interpreter has reset its handlers.\"""
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, 15)
at_the_end = AtTheEnd()
try:{WAITING}except KeyboardInterrupt:
    sys.exit(130)
except Stopped as stop:
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    "numbers, out",
    [
        ([signal.SIGINT, signal.SIGTERM], "cleaned\n"),
        ([signal.SIGTERM], "cleaned\n"),
        ([signal.SIGINT, signal.SIGINT], "at once: interrupted\n"),
    ],
)
def test_after_a_signal_others_are_ignored_to_the_end_and_a_second_ctrl_c_ends_at_once(
    numbers: list[signal.Signals], out: str
) -> None:
    process = begin(INTERRUPTED)
    process.send_signal(numbers[0])
    assert process.stdout is not None and process.stdout.readline() == "cleaning\n"
    for number in numbers[1:]:
        process.send_signal(number)
    assert process.communicate(timeout=20) == (out, "")
    assert process.returncode == 128 + numbers[0]


@pytest.mark.parametrize("blocked", ["in C", "in Python"])
def test_a_process_that_does_not_react_ends_when_its_patience_is_over(blocked: str) -> None:
    """It waits in C, where no handler of Python runs, or a library has swallowed the exception."""
    program = """
import ctypes
signals.PATIENCE = 0.5
def wait_in_c():
    # Another thread gets the signal, so that the call is not interrupted.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
def swallow():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except BaseException:
        time.sleep(60)
with StopSignals(lambda stop: print("patience is over:", stop, flush=True)):
    wait_in_c() if sys.argv[1] == "in C" else swallow()
"""
    process = begin(program, blocked)
    # The process must have entered the call.
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "patience is over: stopped by SIGTERM\n")
    assert 0.4 < time.monotonic() - began < 15


@pytest.mark.parametrize("inner", [False, True], ids=["one context", "after an inner context"])
def test_writing_a_checkpoint_may_take_longer(inner: bool) -> None:
    program = f"""
signals.PATIENCE = 0.3
with StopSignals(lambda stop: None):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except Stopped:
        with signals.no_deadline():
            if {inner}:
                with signals.no_deadline():
                    pass
            time.sleep(1)
            print("saved", flush=True)
        time.sleep(60)
"""
    process = begin(program)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "saved\n")


def test_without_a_signal_the_earlier_handlers_return() -> None:
    earlier = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals(lambda stop: None) as signals:
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != earlier
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == earlier
    assert signals.stop is None
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    assert fd == -1


def test_exit_codes_of_signals_are_those_of_the_shell() -> None:
    assert [exit_code(code) for code in (0, 2, -signal.SIGTERM, -signal.SIGKILL)] == [0, 2, 143, 137]
    assert Stopped(signal.SIGUSR1).exit_code == 128 + signal.SIGUSR1


CHILD = """
try:
    with StopSignals(lambda stop: None):
        stop_with_parent()
        assert "ARVIDEO_PARENT" not in os.environ
        Path(sys.argv[1]).write_text("ready")
        time.sleep(60)
except Stopped as stop:
    Path(sys.argv[1]).write_text(str(stop))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_is_stopped_when_its_parent_has_died(number: int, tmp_path: Path) -> None:
    parent = """
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], env=child_environment())
while not Path(sys.argv[2]).exists():
    time.sleep(0.02)
Path(sys.argv[3]).write_text(str(child.pid))
print("ready", flush=True)
time.sleep(60)
"""
    said, pid = tmp_path / "said", tmp_path / "pid"
    process = begin(parent, HEAD + CHILD, str(said), str(pid))
    child = int(pid.read_text())
    assert not ended(child)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert_end([child])
    assert said.read_text() == "stopped by SIGTERM"


@pytest.mark.parametrize(
    "launcher, stopped",
    [("accelerate", True), ("torchrun", True), ("deepspeed", True), ("wrapper.sh", False)],
)
def test_the_end_of_a_launcher_stops_a_process_but_not_the_end_of_a_shell(
    launcher: str, stopped: bool, tmp_path: Path
) -> None:
    script, said, pid = tmp_path / launcher, tmp_path / "said", tmp_path / "pid"
    script.write_text(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {HEAD + CHILD!r}, {str(said)!r}])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    # This process, which has started the launcher, is not the parent of what the launcher starts.
    environment = {**child_environment(), "PYTHONPATH": "."}
    process = subprocess.Popen([sys.executable, str(script), "launch"], cwd=ROOT, env=environment)
    wait_for(lambda: said.exists() and said.read_text())
    time.sleep(0.2)
    assert said.read_text() == "ready"
    process.kill()
    process.wait()
    child = int(pid.read_text())
    if stopped:
        assert_end([child])
        assert said.read_text() == "stopped by SIGTERM"
    else:
        time.sleep(1.5)
        assert not ended(child) and said.read_text() == "ready"
        os.kill(child, signal.SIGKILL)
