"""Every path that docs/guarantees.md names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
PATHS = sorted(set(re.findall(r"(?:tests|data|ar_model|tokenizer|pipelines)/[\w/]+(?:\.py)?", TEXT)))


@pytest.mark.parametrize("path", PATHS)
def test_a_named_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_guarantee_names_a_test_and_its_code() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and not line.startswith(("|---", "| guarantee"))]
    assert len(rows) > 40
    for row in rows:
        _, name, meaning, tests, code, _ = row.split("|")
        assert name.strip() and meaning.strip() and code.strip()
        assert all(path.startswith("tests/") for path in tests.strip().split(", ")), name
