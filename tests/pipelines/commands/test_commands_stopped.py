"""Commands that SIGTERM or SIGUSR1 stops at any moment leave no process behind and continue bit for bit."""

from pathlib import Path

import pytest

from tests.helpers.commands import kills


def check(project: Path, folder: Path, trials: int, *names: str) -> None:
    for name, result in kills("stop_commands", trials, str(project), str(folder), *names).items():
        assert result["wrong"] == [], name
        assert result["stops"] == trials, name
        assert result["longest"] < 30, name


def test_a_stopped_training_and_a_stopped_tokenize_continue(finished_project: Path, tmp_path: Path) -> None:
    check(finished_project, tmp_path, 2, "train", "tokenize")


@pytest.mark.soak
def test_fifty_stops(finished_project: Path, tmp_path: Path) -> None:
    check(finished_project, tmp_path / "a", 18, "train", "tokenize")
    check(finished_project, tmp_path / "b", 7, "train-workers", "compare")
