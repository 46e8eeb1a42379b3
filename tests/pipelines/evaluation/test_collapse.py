"""A tokenizer whose codes collapse is told of once, with what to do; one that cannot use more codes is not."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation.collapse import CollapseAlarm, collapse_warning
from tests.helpers.commands import TINIEST, Call
from tests.helpers.videos import MakeVideo
from tokenizer.quantizers import EMAVQQuantizer, FSQQuantizer


def test_few_codes_are_told_of_once_with_what_to_do() -> None:
    alarm = CollapseAlarm(1000, 10_000, "buy more codes")
    assert alarm.check(1, 950) is None
    warning = alarm.check(2, 951)
    assert warning == collapse_warning(49, 1000, "buy more codes")
    assert "WARNING: only 49 of 1000 codes are in use." in warning and "buy more codes" in warning
    assert alarm.check(3, 990) is None
    assert alarm.check(4, 400) is None


def test_a_fall_to_half_of_what_was_is_told_of_once() -> None:
    alarm = CollapseAlarm(1000, 10_000, "buy more codes")
    assert [alarm.check(step, dead) for step, dead in enumerate((700, 200, 590))] == [None] * 3
    warning = alarm.check(30, 620)
    assert warning is not None and warning.startswith("WARNING: at step 30 38 % of the codes are in use, after 80 %:")
    assert "buy more codes" in warning
    assert alarm.check(40, 800) is None
    few = alarm.check(50, 980)
    assert few is not None and "only 20 of 1000" in few, "which is another matter"


def test_a_rise_is_no_reason() -> None:
    alarm = CollapseAlarm(16, 512, "")
    assert [alarm.check(step, 15 - step) for step in range(16)] == [None] * 16


@pytest.mark.parametrize(("used", "warns"), [(300, False), (160, False), (16, False), (15, True), (1, True)])
def test_no_more_codes_are_asked_for_than_were_validated(used: int, warns: bool) -> None:
    """320 codes of a vocabulary of 64000: what counts is the share of those 320."""
    warning = CollapseAlarm(64_000, 320, "").check(1, 64_000 - used)
    assert (warning is not None) == warns
    assert warning is None or f"only {used} of 64000 codes" in warning


@pytest.mark.parametrize(
    ("quantizer", "vocabulary", "advice"),
    [("fsq", 64_000, FSQQuantizer.advice), ("emavq", 512, EMAVQQuantizer.advice)],
)
def test_a_tokenizer_that_sees_only_black_warns_once(
    call: Call, tmp_path: Path, make_video: MakeVideo, quantizer: str, vocabulary: int, advice: str
) -> None:
    (tmp_path / "black").mkdir()
    for number in range(4):
        make_video(tmp_path / "black" / f"{number}.mp4", [np.zeros((64, 64, 3), np.uint8)] * 8, codec="libx264")
    flags = ["--videos", str(tmp_path / "black"), "--clip.size", "64", "--clip.frames", "8", "--validate_every", "2"]
    flags += ["--model.name", f"vq3d-2x8x8-{quantizer}{vocabulary}", "--out", str(tmp_path / "run")]
    call("train_tokenizer", *TINIEST, *flags)
    (line,) = [line for line in call.err.splitlines() if "WARNING" in line]
    assert line.endswith("and look at the tokenizer's pictures first.") and advice in line
    only, used, of, said = line.split()[1:5]
    assert (only, of, said) == ("only", "of", str(vocabulary))
    assert 1 <= int(used) < 0.05 * 256, "of the 256 codes of the one clip that is held out"
