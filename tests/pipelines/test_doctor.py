"""The command doctor prints each check, and tells by its exit code whether something can be fixed."""

import subprocess
import sys

import pytest

from pipelines import doctor
from pipelines.engine.environment import Check
from tests.helpers.commands import ENVIRONMENT, ROOT


@pytest.mark.parametrize("fix, code", [("", 0), ("run `make setup`", 1)])
def test_the_report_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fix: str, code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setattr(
        doctor, "checks", lambda: iter([Check("torch", "2.13.0"), Check("webdataset", "not installed", fix)])
    )
    assert doctor.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["torch", "2.13.0"] and "not installed" in lines[1]
    assert [line.split("fix: ")[1] for line in lines if "fix: " in line] == [fix] * code


@pytest.mark.parametrize("start", [["-m", "pipelines.doctor"], ["pipelines/doctor.py"]])
def test_it_starts_as_a_module_and_as_a_file(start: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *start, "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "usage: doctor" in result.stdout, result.stderr
