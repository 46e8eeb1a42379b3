"""A cache whose tokenize was killed at any moment is completed by the next tokenize, byte for byte."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import kills


@pytest.mark.parametrize("trials", [4, pytest.param(200, marks=pytest.mark.soak)])
def test_a_killed_tokenize_is_completed(
    finished_project: Path, answers: dict[str, Any], tmp_path: Path, trials: int
) -> None:
    tokenizer = str(finished_project / answers["train_tokenizer"]["run"])
    result = kills("kill_tokenize", trials, tokenizer, str(tmp_path))
    assert result["wrong"] == []
    assert result["early"] > 0.8 * trials, "most kills must hit a working process"
