"""A command that is interrupted or fails ends with one line at any moment."""

from pathlib import Path
from typing import NoReturn

import pytest

from pipelines.engine.launch import command
from pipelines.settings.probe import Probe
from tests.helpers.commands import TINY_MODEL, begin_ranks, refused

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
    script = Path(__file__).parents[3] / "pipelines" / "pretrain_ar.py"
    for rank in begin_ranks(finished_project, str(script), *flags):
        assert str(tmp_path / "file") in refused(rank.wait(60))
