"""Bits per second of video count valid frames only, at any way to cut clips."""

from pathlib import Path

import pytest

from data.cache import TokenCache
from pipelines.engine.bit_rate import bits_per_second, clip_seconds, fixed_bits
from tests.helpers.caches import MakeCache
from tests.helpers.commands import Call
from tests.helpers.videos import MakeVideo, moving_square

CLIP = ["--clip.frames", "8", "--clip.size", "32", "--tokenizer", "linear-2x8x8-3x64", "--workers", "0"]


@pytest.fixture
def folder(tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with two videos of 20 frames at 10 frames per second in `videos`."""
    (tmp_path / "videos").mkdir()
    for number in range(2):
        make_video(tmp_path / "videos" / f"{number}.mp4", moving_square(1, 9 * number), rate=10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [
        ([], 0.8),
        (["--clip.stride", "2"], 1.6),
        (["--clip.fps", "5"], 1.6),
        (["--clip.seconds", "1"], 1.0),
        (["--clip.span", "video"], 2.0),
        (["--clip.seconds", "4"], 2.0),  # half of the frames are padding
        (["--clip.views", "dense"], 20 / 10 / 3),  # three clips, the last one of four valid frames
    ],
)
def test_bits_are_those_of_a_second_of_valid_frames(call: Call, folder: Path, flags: list[str], seconds: float) -> None:
    answer = call("tokenize", "--videos", "videos", *CLIP, *flags)
    cache = TokenCache.open(answer["cache"])
    assert clip_seconds(cache) == pytest.approx(seconds, rel=0.01)
    bits = 4 * 4 * 4 * answer["bits_per_place"]
    assert answer["bits_per_second"] == pytest.approx(bits / seconds, rel=0.01)


def test_bits_of_a_code_are_the_mean_over_the_codes_of_a_place(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 2, codes_per_place=2, vocab_size=64, levels=((64,), (4, 4))))
    assert fixed_bits(cache) == (6 + 4) / 2
    per_clip = 5.0 * 2 * 3 * 3 * 2
    assert bits_per_second(cache, 5.0) == pytest.approx(per_clip / (clip_seconds(cache) or 0))
