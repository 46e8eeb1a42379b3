"""The message that compares clips with those that a tokenizer was trained on."""

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from data.clip_spec import ClipSpec
from pipelines.engine.recorded_clip import say_recorded_clip

TRAINED = ClipSpec(frames=8, size=32, stride=2, views=4, fps=12.5, scales=(1, 0.75))
CLIP = "{frames: 8, size: 32, stride: 2, views: 4, fps: 12.5, scales: [1, 0.75]}"


def said(folder: Path, recorded: str, clip: ClipSpec, capsys: pytest.CaptureFixture[str]) -> str:
    (folder / "config.yaml").write_text(f"clip: {recorded}\n")
    say_recorded_clip(Accelerator(cpu=True), [str(folder)], clip)
    return capsys.readouterr().err


@pytest.mark.parametrize("views", [1, 4, "dense"])
def test_equal_clips_with_scales_and_other_views_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], views: int
) -> None:
    line = said(tmp_path, CLIP, replace(TRAINED, views=views), capsys)
    assert "are cut like" in line and "scales 1,0.75" in line and "fps 12.5" in line and f"views {views}" in line
    assert ("in training 4" in line) == (views != 4)


def test_a_run_from_before_a_setting_has_its_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = "{frames: 16, size: 64, stride: 1, views: 1, flip: false}"
    assert "are cut like" in said(tmp_path, old, ClipSpec(), capsys)
    line = said(tmp_path, old, ClipSpec(fps=8, scales=(0.75,)), capsys)
    assert "differ" in line and "fps 8 (in training not set)" in line and "scales 0.75 (in training not set)" in line
    assert "fps not set (in training 12.5)" in said(tmp_path, CLIP, replace(TRAINED, fps=None), capsys)
