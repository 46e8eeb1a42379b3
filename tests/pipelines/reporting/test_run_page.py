"""The page of a run says which clips its numbers are of."""

from pathlib import Path

import pytest

from data.sources import Video
from tests.helpers.caches import MakeCache
from tests.helpers.commands import Call

TRAINING = ["--precision", "fp32", "--attention", "plain", "--batch_size", "4", "--steps", "2", "--warmup", "1"]
SMALL = [
    *("--objective.clusters", "[1,2,2]", "--objective.width", "24", "--objective.depth", "1", "--objective.heads", "2"),
    *("--objective.decoder_width", "24", "--objective.decoder_depth", "1", "--objective.decoder_heads", "2"),
    *TRAINING,
]
PIXELS = ["--objective.input", "pixels", "--objective.target", "pixels"]


@pytest.mark.parametrize("flags", [[], PIXELS], ids=["codes", "pixels"])
@pytest.mark.parametrize("groups", [1, 4])
def test_numbers_of_training_clips_are_not_called_held_out(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cache: MakeCache, flags: list[str], groups: int
) -> None:
    monkeypatch.chdir(tmp_path)
    videos = [Video(f"{i:03}.mp4", 1, group=f"g{i % groups}") for i in range(8)]
    # The 512 codes can use 2.6 % of the vocabulary.
    make_cache(tmp_path / "caches", videos, codes_shape=(2, 4, 4), keep_pixels="raw", vocab_size=20_000)
    summary = call("pretrain_ar", *SMALL, *flags)
    warned = "nothing is held out" in call.err
    text = Path(call("report")["page"]).read_text()
    assert (summary["held_out"], warned, "held out" in text) == ((0, True, False) if groups == 1 else (2, False, True))
    assert ("training clips" in text) == (groups == 1)
    assert "codes are in use" not in text, "a false warning of a collapse"


MAM2 = ["--objective", "MAM2", "--objective.appearance", "0", "--objective.motion", "3", "--objective.align", "2"]
MAM2 += ["--objective.width", "24", "--objective.depth", "1", "--objective.heads", "2", "--objective.ratio", "0.5"]


@pytest.mark.parametrize(
    ("flags", "key", "name"),
    [
        ([*SMALL, *PIXELS], "loss", "squared error of normalised pixels"),
        ([*TRAINING, *MAM2], "motion", "squared error of normalised RGB differences"),
    ],
    ids=["ARVideo", "MAM2"],
)
def test_an_error_of_pixels_has_its_name_and_the_baseline_of_the_same_clips(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_cache: MakeCache,
    flags: list[str],
    key: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_cache(tmp_path / "caches", 8, codes_shape=(2, 4, 4), keep_pixels="raw")
    summary = call("pretrain_ar", *flags)
    text = Path(call("report")["page"]).read_text()
    assert f"{name}, held out</span><b>{summary[key]:.3f}</b>" in text
    assert f"gives {summary['pixel_baseline']:.3f}<" in text
    # A tubelet has 8 random pixels; between its two frames are 4 differences. The variance is unbiased.
    assert summary["pixel_baseline"] == pytest.approx(7 / 8 if key == "loss" else 3 / 4, rel=0.02)
