"""Each program in examples/ does what its docstring says, on tiny videos."""

from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.commands import ROOT, python


def run(folder: Path, name: str, *arguments: str) -> str:
    """Run an example in a folder and return what it prints."""
    return python(folder, str(ROOT / "examples" / f"{name}.py"), *arguments)


def test_own_tokenizer_fills_a_cache(tmp_path: Path) -> None:
    said = run(tmp_path, "own_tokenizer", "builtin:moving-digits:8:4")
    assert "12 videos, codes of shape (1, 8, 8, 8)" in said
    assert "decoded: (1, 16, 64, 64, 3)" in said


def test_read_a_cache_prints_codes_and_batches(finished_project: Path, answers: dict[str, Any]) -> None:
    said = run(finished_project, "read_a_cache", answers["tokenize"]["cache"])
    assert "step 2: codes_BTHW (4, 8, 8, 8)" in said


def test_draw_run_writes_a_picture(finished_project: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    run(finished_project, "draw_run", answers["pretrain_ar"]["run"], str(tmp_path / "picture.png"))
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 2 * picture.height > 400
