"""Clips of a length in seconds, and clips whose frames are spread over the whole video."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.clip_spec import ClipSpec
from data.clips import ClipCuts, describe, iter_clips, read_clip, read_clips, recorded_views
from data.sources import Source, load_source
from data.timing import Timing
from tests.helpers.videos import frame_numbers, make_video, numbered_frames

SPEC = ClipSpec(frames=8, size=16)


def numbered_source(folder: Path, count: int, rate: int = 20, **settings: list[int]) -> Source:
    make_video(folder / "a.mp4", numbered_frames(count, 32, 48), rate=rate, **settings)
    return load_source(str(folder))


def numbers_of(source: Source, spec: ClipSpec, view: int = 0) -> list[int]:
    return frame_numbers(read_clip(source, source.videos[0], spec, view))


# --- seconds


@pytest.mark.parametrize("rate", [4, 8, 12])
def test_a_clip_of_some_seconds_shows_the_same_time_at_every_frame_rate(tmp_path: Path, rate: int) -> None:
    source = numbered_source(tmp_path, 29, rate)
    numbers = numbers_of(source, replace(SPEC, seconds=2.0))
    assert np.diff(numbers).tolist() == [rate // 4] * 7
    assert (numbers[0] + numbers[-1]) / 2 == pytest.approx(14, abs=rate / 4), "the middle of the video"


def test_seconds_are_another_name_of_a_frame_rate(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 29)
    for views in (3, "dense"):
        specs = [replace(SPEC, views=views, **one) for one in ({"seconds": 0.8}, {"fps": 10})]  # type: ignore[arg-type]
        by_seconds, by_rate = (list(iter_clips(source, source.videos[0], spec)) for spec in specs)
        assert by_seconds.pop() == by_rate.pop()
        assert np.array_equal(by_seconds, by_rate)


# --- spread over the video


@pytest.mark.parametrize("count", [8, 9, 24, 29])
def test_frames_are_those_in_the_middle_of_equal_parts(tmp_path: Path, count: int) -> None:
    source = numbered_source(tmp_path, count)
    expected = [int((i + 0.4995) * count / 8) for i in range(8)]
    assert numbers_of(source, replace(SPEC, span="video")) == pytest.approx(expected, abs=1)
    assert len(set(numbers_of(source, replace(SPEC, span="video")))) == 8


def test_a_short_video_repeats_frames_evenly_and_is_not_padded(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 4)
    assert numbers_of(source, replace(SPEC, span="video")) == [0, 0, 1, 1, 2, 2, 3, 3]
    clips = read_clips(source, source.videos[0], replace(SPEC, span="video"))
    assert clips.views[0].real == 8


def test_frames_are_spread_in_time_not_by_number(tmp_path: Path) -> None:
    """The first second has 20 frames, the rest has two. The file says that the last one is displayed for 0.01 seconds."""
    times = [*range(0, 100, 5), 100, 150]
    source = numbered_source(tmp_path, 22, rate=100, times=times)
    numbers = numbers_of(source, replace(SPEC, span="video"))
    shown = [times[number] / 100 for number in numbers]
    middles = [(i + 0.4995) * 1.51 / 8 for i in range(8)]
    for time, middle in zip(shown, middles, strict=True):
        following = min((t / 100 for t in times if t / 100 > time), default=1.51)
        assert time <= middle <= following


def test_views_are_shifted_in_time(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 24)
    spec = replace(SPEC, span="video", views=12)
    numbers = [numbers_of(source, spec, view) for view in range(12)]
    assert len({tuple(view) for view in numbers}) == 3, "three frames in each eighth of the video"
    for view in numbers:
        assert [number * 8 // 24 for number in view] == list(range(8))
    assert numbers[0] == numbers_of(source, replace(spec, views=1)), "the first view does not depend on their number"


def test_views_are_recorded(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 24)
    spec = replace(SPEC, span="video", views=3, flip=True, scales=(0.75,))
    *_, cuts = iter_clips(source, source.videos[0], spec)
    assert isinstance(cuts, ClipCuts)
    assert recorded_views(json.loads(json.dumps(describe(cuts.views, spec)))) == cuts.views
    assert len({view.shift for view in cuts.views}) == 3
    assert (cuts.frames, cuts.rate) == (8, pytest.approx(8 / 1.2)), "8 frames in the 1.2 seconds of the video"


def test_built_in_videos_are_spread_by_number() -> None:
    source = load_source("builtin:moving-digits:2:0")
    clip = read_clip(source, source.videos[0], ClipSpec(span="video"), 0)
    assert clip.shape == (16, 64, 64, 3)


# --- times


@pytest.mark.parametrize("stamps", [[], [None] * 12, [3.0] * 12])
def test_unknown_times_count_as_equal(stamps: list) -> None:
    assert Timing(12, None, stamps).spread(4, 0.5).tolist() == [1, 4, 7, 10]
    assert Timing(12, None, stamps).rate_of(4) is None


def test_duration_of_the_last_frame_counts() -> None:
    timing = Timing(3, 10.0, [0.0, 0.1, 0.2], last=0.8)
    assert timing.spread(10, 0.5).tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2]
    assert timing.rate_of(10) == pytest.approx(10)


def test_extreme_times_stay_within_the_video() -> None:
    for timing in (
        Timing(1, None),
        Timing(1, 25.0, [5.0]),
        Timing(2, 1e-300, [0.0, 1e300]),
        Timing(3, 25.0, [1.0, 0.5, 2.0]),
    ):
        for shift in (0.0, 0.999):
            numbers = timing.spread(16, shift)
            assert 0 <= numbers.min() <= numbers.max() < timing.total and (np.diff(numbers) >= 0).all()


# --- settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seconds": 0}, "clip.seconds must be at least 0.008"),
        ({"seconds": 1e7}, "clip.seconds"),
        ({"seconds": float("nan")}, "clip.seconds"),
        ({"seconds": 2, "fps": 5}, "clip.seconds 2 and clip.fps 5"),
        ({"seconds": 2, "stride": 2}, "needs clip.stride 1"),
        ({"span": "clip"}, "clip.span must be video or null"),
        ({"span": "video", "fps": 5}, "clip.span video and clip.fps 5"),
        ({"span": "video", "seconds": 5}, "clip.span video and clip.seconds 5"),
        ({"span": "video", "stride": 2}, "clip.span video and clip.stride 2"),
        ({"span": "video", "views": "dense"}, "clip.span video and clip.views dense"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(SPEC, **settings)


def test_settings_without_a_value_are_not_in_the_key() -> None:
    assert not {"seconds", "span"} & set(SPEC.to_json())
    for settings in ({"seconds": 2.0}, {"span": "video"}):
        spec = replace(SPEC, **settings)
        assert ClipSpec(**json.loads(json.dumps(spec.to_json()))) == spec
