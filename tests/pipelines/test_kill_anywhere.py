"""A tokenize that is killed at any moment is completed by the next one, byte for byte (R1)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ENVIRONMENT, ROOT


@pytest.mark.parametrize("trials", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_a_killed_tokenize_is_completed(house: Path, answers: dict[str, Any], tmp_path: Path, trials: int) -> None:
    tokenizer = str(house / answers["train_tokenizer"]["run"])
    result = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.killing", str(trials), tokenizer, str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["early"] > 0.8 * trials, "most kills must come while it works"
