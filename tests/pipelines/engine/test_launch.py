"""A command that is interrupted or fails ends with one line at any moment."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from pipelines.engine.launch import command
from pipelines.settings.probe import Probe
from tests.helpers.commands import ENVIRONMENT, ROOT, TINY_MODEL, begin_ranks, refused

pytestmark = pytest.mark.usefixtures("handlers_return")


@pytest.mark.parametrize(
    "moment", ["pipelines.engine.launch.parse", "pipelines.engine.cpu_processes.start_cpu_processes"]
)
def test_ctrl_c_while_a_command_starts_is_one_line(
    moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interrupt comes while flags are parsed or torch is imported, which takes seconds."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["probe.py"])
    monkeypatch.setattr(moment, interrupt)
    with pytest.raises(SystemExit) as stop:
        command(Probe, lambda config, settings: {})
    assert stop.value.code == 130
    assert capsys.readouterr().err == "probe: error: interrupted; run the same command again to continue\n"


ONE_FAILS = """
import errno, sys
from accelerate import PartialState
from pipelines.engine import launch
from pipelines.settings.probe import Probe

def body(config, settings):
    state = PartialState(cpu=True)
    state.wait_for_everyone()
    if state.is_main_process:
        raise OSError(errno.ENOSPC, "No space left on device", "run/environment.json")
    state.wait_for_everyone()

launch._END_BY_LAUNCHER = 0.5
sys.argv = ["probe.py"]
launch.command(Probe, body)
"""


def test_an_error_of_one_process_is_one_line_in_each_process(tmp_path: Path) -> None:
    """A launcher ends the second process before it prints its line. Without a launcher, the line tells the consequence."""
    failed, other = [rank.wait(60) for rank in begin_ranks(tmp_path, "-c", ONE_FAILS)]
    assert "run/environment.json" in refused(failed)
    assert other.returncode == 1 and "Traceback" not in other.stderr
    (line,) = [line for line in other.stderr.splitlines() if ": error: " in line]
    assert "another process" in line and "peer" in line


def test_all_processes_know_that_the_run_folder_cannot_be_made(finished_project: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = [*TINY_MODEL, "--out", str(tmp_path / "file" / "run")]
    for rank in begin_ranks(finished_project, str(ROOT / "pipelines" / "pretrain_ar.py"), *flags):
        assert str(tmp_path / "file") in refused(rank.wait(60))


@pytest.mark.parametrize("program", [["pipelines/export.py"], ["-m", "pipelines.export"]])
def test_ctrl_c_while_a_command_imports_its_modules_prints_no_traceback(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "jsonargparse.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    result = subprocess.run(
        [sys.executable, *program],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")
