"""A pre-training run that is killed repeatedly, at any moment, ends bit for bit like one that was never killed."""

from pathlib import Path

import pytest

from tests.helpers.commands import kills


@pytest.mark.parametrize("trials", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_a_killed_pretraining_ends_the_same(finished_project: Path, tmp_path: Path, trials: int) -> None:
    result = kills("kill_pretrain", trials, str(finished_project), str(tmp_path))
    assert result["wrong"] == []
    assert result["early"] >= trials, "most kills must hit a working process"
    if trials >= 50:
        assert {"while a checkpoint is written", "while the model is written"} <= set(result["stages"])
