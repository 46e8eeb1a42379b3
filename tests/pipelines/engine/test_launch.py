"""A command that is interrupted or fails ends with one line at any moment."""

from typing import NoReturn

import pytest

from pipelines.engine.launch import command
from pipelines.settings.probe import Probe


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
