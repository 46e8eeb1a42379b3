"""A pre-training that is killed at any moments of its life ends as if it had not been, bit for bit (R1, R2)."""

from pathlib import Path

import pytest

from tests.helpers.commands import kills


@pytest.mark.parametrize("trials", [6, pytest.param(50, marks=pytest.mark.soak)])
def test_a_killed_pretraining_ends_the_same(finished_project: Path, tmp_path: Path, trials: int) -> None:
    found = kills("kill_pretrain", trials, str(finished_project), str(tmp_path))
    assert found["wrong"] == []
    assert found["early"] >= trials, "most kills must come while it works"
    if trials >= 50:
        assert {"while a checkpoint is written", "while the model is written"} <= set(found["stages"])
