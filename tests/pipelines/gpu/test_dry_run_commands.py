"""The parts of the GPU check that start commands run on the CPU in small; test_dry_run.py has the other parts."""

from pathlib import Path

import pytest

from tests.helpers.gpu_dry_run import check_part


@pytest.mark.soak
def test_a_run_that_was_killed_has_the_losses_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = check_part(7, tmp_path, monkeypatch)
    assert [value for what, value in rows.items() if "losses" in what] == [0.0, 0.0]


@pytest.mark.parametrize("number", [8, pytest.param(9, marks=pytest.mark.soak)])
def test_a_part_measures_all_its_rows(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_part(number, tmp_path, monkeypatch)
