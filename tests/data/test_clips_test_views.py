"""Test views are evenly spread over time and over the longer side, and a single one is the canonical view."""

from pathlib import Path

import numpy as np
import pytest

from data.clip_spec import ClipSpec
from data.clips import ClipCuts, View, iter_test_views, read_clip
from data.sources import Source, load_source
from tests.helpers.videos import MakeVideo, frame_numbers, numbered_frames


@pytest.fixture
def source(tmp_path: Path, make_video: MakeVideo) -> Source:
    """A source with one video of 24 numbered frames of 48 x 64 pixels."""
    make_video(tmp_path / "video.mp4", numbered_frames(24), codec="mpeg4", rate=8)
    return load_source(str(tmp_path))


def views_of(source: Source, spec: ClipSpec, clips: int, crops: int) -> tuple[list[np.ndarray], list[View]]:
    *pixels, cuts = iter_test_views(source, source.videos[0], spec, clips, crops)
    assert isinstance(cuts, ClipCuts)
    return pixels, list(cuts.views)  # type: ignore[return-value]


def test_clips_cover_the_video_from_end_to_end(source: Source) -> None:
    pixels, views = views_of(source, ClipSpec(frames=4, size=16, stride=2), 3, 1)
    # A clip spans 7 of 24 frames: the last one starts at frame 17.
    assert [view.start for view in views] == [0, 8, 17]
    assert [frame_numbers(clip) for clip in pixels] == [[0, 2, 4, 6], [8, 10, 12, 14], [17, 19, 21, 23]]


def test_crops_cover_the_longer_side(source: Source) -> None:
    _, views = views_of(source, ClipSpec(frames=4, size=24), 2, 3)
    # A frame of 48 x 64 is resized to 24 x 32.
    assert [view.left for view in views] == [0, 4, 8, 0, 4, 8] and {view.top for view in views} == {0}
    assert [view.start for view in views] == [0, 0, 0, 20, 20, 20]


@pytest.mark.parametrize(
    "settings", [{"stride": 3}, {"fps": 5.0}, {"span": "video"}, {"views": 3, "flip": True, "scales": [0.5]}]
)
def test_a_single_view_is_the_canonical_one(source: Source, settings: dict) -> None:
    spec = ClipSpec(**{"frames": 4, "size": 16, **settings})
    (clip,), _ = views_of(source, spec, 1, 1)
    assert np.array_equal(clip, read_clip(source, source.videos[0], spec, 0))


def test_frames_that_are_spread_over_the_video_are_shifted_evenly(source: Source) -> None:
    pixels, views = views_of(source, ClipSpec(frames=4, size=16, span="video"), 3, 1)
    assert [view.shift for view in views] == [166, 500, 833]
    assert [frame_numbers(clip) for clip in pixels] == [[0, 6, 12, 18], [3, 9, 15, 21], [4, 10, 16, 22]]


def test_views_of_a_short_video_are_padded(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "short.mp4", numbered_frames(3))
    source = load_source(str(tmp_path))
    pixels, views = views_of(source, ClipSpec(frames=4, size=16), 2, 1)
    assert [view.real for view in views] == [3, 3] and frame_numbers(pixels[1]) == [0, 1, 2, 2]
