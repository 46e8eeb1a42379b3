"""Views: pure functions of (specification, path, number), inside the frame, and reproducible from their records."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.clip_spec import ClipSpec
from data.clips import Clips, View, describe, read_clips, recorded_views
from data.decoding import DamagedVideo, read_frames
from data.moving_digits import render
from data.sources import Source, Video, load_source
from tests.helpers.videos import frame_numbers, make_video, numbered_frames

SPEC = ClipSpec(frames=4, size=32, stride=2, views=6, flip=True)


def cut_again(source: Source, video: Video, view: View, count: int) -> np.ndarray:
    """Cut the pixels of a view again, from nothing but its record."""
    assert source.root is not None
    pixels = read_frames(source.root / video.path, view.size, lambda _: view.frames(count)).pixels_THWC
    box = pixels[:, view.top : view.top + view.size, view.left : view.left + view.size]
    return box[:, :, ::-1] if view.flip else box


def numbered_source(folder: Path, count: int) -> Source:
    """Source of one video of numbered frames."""
    make_video(folder / "a.mp4", numbered_frames(count, 32, 32))
    return load_source(str(folder))


def is_padded(clips: Clips) -> bool:
    return any(view.real < clips.pixels_VTHWC.shape[1] for view in clips.views)


@pytest.fixture(scope="module")
def source(video_folder: Path) -> Source:
    return load_source(str(video_folder))


@pytest.fixture(scope="module")
def all_clips(source: Source) -> list[Clips]:
    return [read_clips(source, video, SPEC) for video in source.videos]


def test_clips_are_uint8_of_the_specified_shape(all_clips: list[Clips]) -> None:
    for clips in all_clips:
        assert clips.pixels_VTHWC.shape == (6, 4, 32, 32, 3)
        assert clips.pixels_VTHWC.dtype == np.uint8
        assert clips.pixels_VTHWC.flags["C_CONTIGUOUS"]
        assert len(clips.views) == 6
        assert not is_padded(clips)


@pytest.mark.parametrize(("count", "start"), [(20, 6), (21, 6), (8, 0), (9, 0), (10, 1)])
def test_view_0_is_the_middle_of_the_video(tmp_path: Path, count: int, start: int) -> None:
    source = numbered_source(tmp_path, count)
    clips = read_clips(source, source.videos[0], ClipSpec(frames=8, size=16, views=3))
    assert clips.views[0].start == start
    assert frame_numbers(clips.pixels_VTHWC[0]) == list(range(start, start + 8))


def test_view_0_is_the_middle_of_the_frame_and_never_mirrored(source: Source, all_clips: list[Clips]) -> None:
    # 48 x 64 pixels become 32 x 43, of which 11 columns are cut off.
    for clips in all_clips:
        view = clips.views[0]
        assert (view.top, view.left, view.flip) == (0, 5, False)


def test_views_do_not_depend_on_the_number_of_views(source: Source, all_clips: list[Clips]) -> None:
    for video, clips in zip(source.videos, all_clips, strict=True):
        alone = read_clips(source, video, replace(SPEC, views=1, flip=False))
        assert np.array_equal(alone.pixels_VTHWC[0], clips.pixels_VTHWC[0])
        more = read_clips(source, video, replace(SPEC, views=8))
        assert more.views[:6] == clips.views


def test_stride_takes_every_stride_th_frame(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 20)
    clips = read_clips(source, source.videos[0], ClipSpec(frames=4, size=16, stride=5, views=4))
    for v, view in enumerate(clips.views):
        assert frame_numbers(clips.pixels_VTHWC[v]) == [view.start + 5 * i for i in range(4)]
        assert view.start + 15 < 20


def test_views_are_the_same_every_time_and_in_every_folder(
    video_folder: Path, source: Source, all_clips: list[Clips], tmp_path: Path
) -> None:
    moved = load_source(str(shutil.copytree(video_folder, tmp_path / "elsewhere")))
    for video, clips in zip(moved.videos, all_clips, strict=True):
        again = read_clips(moved, video, SPEC)
        assert again.views == clips.views
        assert np.array_equal(again.pixels_VTHWC, clips.pixels_VTHWC)


def test_views_differ_within_a_video_and_between_videos(all_clips: list[Clips]) -> None:
    drawn = [view for clips in all_clips for view in clips.views[1:]]
    assert len({view.start for view in drawn}) > 8
    assert len({view.left for view in drawn}) > 6
    assert {view.flip for view in drawn} == {True, False}
    assert not any(a.views[1:] == b.views[1:] for a, b in itertools.combinations(all_clips, 2))


def test_crop_and_clip_stay_inside_the_video(all_clips: list[Clips]) -> None:
    for view in (view for clips in all_clips for view in clips.views):
        assert 0 <= view.top <= 32 - view.size
        assert 0 <= view.left <= 43 - view.size
        assert view.start >= 0
        assert max(view.frames(4)) < 20


def test_recorded_view_cuts_the_same_pixels_again(source: Source, all_clips: list[Clips]) -> None:
    for video, clips in zip(source.videos, all_clips, strict=True):
        recorded = recorded_views(json.loads(json.dumps(describe(clips.views, SPEC))))
        assert recorded == clips.views
        for view, pixels in zip(recorded, clips.pixels_VTHWC, strict=True):
            assert np.array_equal(cut_again(source, video, view, SPEC.frames), pixels)


def test_flip_mirrors_left_to_right_and_nothing_else(source: Source, all_clips: list[Clips]) -> None:
    mirrored = 0
    for video, clips in zip(source.videos, all_clips, strict=True):
        plain = read_clips(source, video, replace(SPEC, flip=False))
        for v, view in enumerate(clips.views):
            assert plain.views[v] == replace(view, flip=False)
            expected = plain.pixels_VTHWC[v]
            assert np.array_equal(clips.pixels_VTHWC[v], np.flip(expected, axis=2) if view.flip else expected)
            mirrored += view.flip and not np.array_equal(expected, np.flip(expected, axis=2))
    assert mirrored > 3


@pytest.mark.parametrize(
    ("stride", "real", "numbers"), [(1, 5, [0, 1, 2, 3, 4, 4, 4, 4]), (2, 3, [0, 2, 4, 4, 4, 4, 4, 4])]
)
def test_short_video_is_padded_with_its_last_frame_and_recorded_so(
    tmp_path: Path, stride: int, real: int, numbers: list[int]
) -> None:
    source = numbered_source(tmp_path, 5)
    clips = read_clips(source, source.videos[0], ClipSpec(frames=8, size=16, stride=stride, views=2))
    assert is_padded(clips)
    for v, view in enumerate(clips.views):
        assert (view.start, view.real) == (0, real)
        assert frame_numbers(clips.pixels_VTHWC[v]) == numbers
        assert np.array_equal(cut_again(source, source.videos[0], view, 8), clips.pixels_VTHWC[v])


def test_video_of_exactly_the_needed_length_is_not_padded(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 7)
    clips = read_clips(source, source.videos[0], ClipSpec(frames=4, size=16, stride=2, views=2))
    assert not is_padded(clips)
    assert frame_numbers(clips.pixels_VTHWC[1]) == [0, 2, 4, 6]


def test_damaged_video_raises_damaged_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    source = load_source(str(tmp_path))
    with pytest.raises(DamagedVideo):
        read_clips(source, source.videos[0], SPEC)


def test_built_in_clip_is_the_middle_of_the_rendered_video() -> None:
    source = load_source("builtin:moving-digits:8:8")
    video = source.videos[-1]
    assert video.path == "train/000007"
    clips = read_clips(source, video, ClipSpec(frames=16, size=64))
    assert np.array_equal(clips.pixels_VTHWC[0], render(0, "train", 7)[8:24])
    small = read_clips(source, video, ClipSpec(frames=8, size=32, views=2))
    assert small.pixels_VTHWC.shape == (2, 8, 32, 32, 3)
    assert [view.start for view in small.views][0] == 12


def test_views_of_built_in_videos_differ() -> None:
    source = load_source("builtin:moving-digits:40:0")
    starts = [[view.start for view in read_clips(source, v, ClipSpec(views=3)).views] for v in source.videos]
    assert [row[0] for row in starts] == [8] * 40
    assert sum(len(set(row)) > 1 for row in starts) == 40
    assert len({start for row in starts for start in row}) == 17


@pytest.mark.parametrize("name", ["frames", "size", "stride", "views"])
def test_number_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"clip\.{name} .* got 0"):
        ClipSpec(**{name: 0})


@pytest.mark.parametrize(
    "settings",
    [
        {"frames": 8, "size": 9000},
        {"frames": 2**62, "size": 2**62},
        {"frames": 10**400},
        {"size": 10**400},
        {"frames": 33, "size": 2**11},
        {"size": 2**11, "scales": (1, 0.5)},
        {"stride": 2**20 + 1},
    ],
)
def test_clip_that_no_memory_holds_is_refused(settings: dict[str, Any]) -> None:
    """A clip of somebody else's cache may declare any size."""
    with pytest.raises(ValueError, match=r"clip\.(frames|stride)"):
        ClipSpec(**settings)


def test_largest_clips_are_allowed() -> None:
    ClipSpec(frames=32, size=2**11, stride=2**20)
    ClipSpec(frames=2**17, size=32)
    ClipSpec(frames=8, size=2**11, scales=(1, 0.5))
