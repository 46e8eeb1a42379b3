"""Every part of the GPU check runs on the CPU in small, with the code that a GPU runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pipelines.gpu.__main__ import PARTS, main
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.gpu_dry_run import EXPECTED, check_part


@pytest.mark.parametrize("number", [1, 2, 3, pytest.param(4, marks=pytest.mark.soak), 5, 6])
def test_a_part_measures_all_its_rows(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_part(number, tmp_path, monkeypatch)


def test_every_part_has_a_dry_run() -> None:
    assert EXPECTED.keys() == PARTS.keys() == {*range(1, 10)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_check_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "6,2", "--out", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert "no CUDA device" in line and "DRY=1" in line


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_passes_its_variables_on() -> None:
    variables = ["DRY=1", "PARTS=1,4", "OUT=some folder", "VIDEOS=my videos"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    words = ["make", "-n", "gpu", *variables]
    result = subprocess.run(
        words, cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=True
    )
    assert '.venv/bin/python -m pipelines.gpu --out "some folder" --dry --parts 1,4' in result.stdout
    assert '--videos "my videos"' in result.stdout
