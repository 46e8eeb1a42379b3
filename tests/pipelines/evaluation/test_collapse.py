"""A collapsing codebook gives one warning with advice. A codebook that cannot use more codes gives none."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation.collapse import CollapseAlarm, collapse_warning
from tests.helpers.commands import TINIEST, Call
from tests.helpers.videos import MakeVideo
from tokenizer.quantizers import EMAVQQuantizer, FSQQuantizer


def test_few_codes_give_one_warning_with_advice() -> None:
    alarm = CollapseAlarm(1000, 10_000, "buy more codes")
    assert alarm.check(1, 950) is None
    warning = alarm.check(2, 951)
    assert warning == collapse_warning(49, 1000, 10_000, "buy more codes")
    assert "WARNING: only 49 of 1000 codes" in warning and "buy more codes" in warning
    assert alarm.check(3, 990) is None
    assert alarm.check(4, 400) is None


def test_a_fall_to_half_of_the_maximum_gives_one_warning() -> None:
    alarm = CollapseAlarm(1000, 10_000, "buy more codes")
    assert [alarm.check(step, dead) for step, dead in enumerate((700, 200, 590))] == [None] * 3
    warning = alarm.check(30, 620)
    assert warning is not None and warning.startswith("WARNING: ")
    assert all(fact in warning for fact in ("step 30", "38 %", "80 %", "buy more codes"))
    assert alarm.check(40, 800) is None
    few = alarm.check(50, 980)
    assert few is not None and "only 20 of 1000" in few, "the other warning is still given"


def test_a_rise_gives_no_warning() -> None:
    alarm = CollapseAlarm(16, 512, "")
    assert [alarm.check(step, 15 - step) for step in range(16)] == [None] * 16


@pytest.mark.parametrize(("used", "warns"), [(300, False), (160, False), (16, False), (15, True), (1, True)])
def test_usage_is_relative_to_the_validated_codes_if_there_are_fewer_than_the_vocabulary(
    used: int, warns: bool
) -> None:
    """A validation with 320 codes cannot use more than 320 of 64,000."""
    warning = CollapseAlarm(64_000, 320, "").check(1, 64_000 - used)
    assert (warning is not None) == warns
    assert warning is None or f"only {used} of 64000 codes" in warning


@pytest.mark.parametrize(
    ("quantizer", "vocabulary", "advice"),
    [("fsq", 64_000, FSQQuantizer.advice), ("emavq", 512, EMAVQQuantizer.advice)],
)
def test_training_on_black_videos_warns_once(
    call: Call, tmp_path: Path, make_video: MakeVideo, quantizer: str, vocabulary: int, advice: str
) -> None:
    (tmp_path / "black").mkdir()
    for number in range(4):
        make_video(tmp_path / "black" / f"{number}.mp4", [np.zeros((64, 64, 3), np.uint8)] * 8, codec="libx264")
    flags = ["--videos", str(tmp_path / "black"), "--clip.size", "64", "--clip.frames", "8", "--validate_every", "2"]
    flags += ["--model.name", f"vq3d-2x8x8-{quantizer}{vocabulary}", "--out", str(tmp_path / "run")]
    call("train_tokenizer", *TINIEST, *flags)
    (line,) = [line for line in call.err.splitlines() if "WARNING" in line]
    assert "reconstructions" in line and advice in line
    only, used, of, total = line.split()[1:5]
    assert (only, of, total) == ("only", "of", str(vocabulary))
    assert 1 <= int(used) < 0.05 * 256, "the one held-out clip has 256 codes"


def test_a_small_share_of_a_large_vocabulary_is_no_collapse() -> None:
    assert collapse_warning(300, 250_000, 10**6) is None
    assert collapse_warning(100, 250_000, 10**6) is not None
