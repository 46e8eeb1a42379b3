"""Clips at another frame rate and crops at several scales: drawn and dense views, cut again from their records."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.cache import CacheSpec, CacheWriter, TokenCache
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, View, describe, iter_clips, read_clip, read_clips, recorded_views
from data.decoding import DamagedVideo, read_frames
from data.pixels import pack_pixels
from data.source_clips import clips_of
from data.sources import Source, load_source
from tests.helpers.cache_contents import SPEC
from tests.helpers.videos import frame_numbers, make_video, moving_blocks, numbered_frames

# Frame i of the irregular video is displayed from TIMES[i] / 100 seconds on.
TIMES = [0, 4, 8, 12, 30, 34, 38, 80, 81, 82, 83, 84, 100, 104, 108, 112, 140, 144, 148, 160]


def numbered_source(folder: Path, count: int, rate: int = 20, **settings: list[int]) -> Source:
    make_video(folder / "a.mp4", numbered_frames(count, 32, 48), rate=rate, **settings)
    return load_source(str(folder))


def on_display(fps: float) -> list[int]:
    """Numbers of the frames of the irregular video that are displayed at 0, 1 / fps, ... until its last frame."""
    count = int(TIMES[-1] / 100 * fps) + 1
    return [max(i for i, time in enumerate(TIMES) if time / 100 <= k / fps + 1e-6) for k in range(count)]


# --- frames per second


@pytest.mark.parametrize(("fps", "stride"), [(20, 1), (10, 2), (5, 4)])
def test_a_fraction_of_the_rate_equals_a_stride(tmp_path: Path, fps: int, stride: int) -> None:
    source = numbered_source(tmp_path, 29)
    for views in (4, "dense"):
        spec = ClipSpec(frames=3, size=16, views=views, flip=True)  # type: ignore[arg-type]  # both are allowed
        resampled, strided = (
            list(iter_clips(source, source.videos[0], replace(spec, **setting)))
            for setting in ({"fps": fps}, {"stride": stride})
        )
        cuts = resampled.pop()
        assert isinstance(cuts, ClipCuts) and (cuts.frames, cuts.rate) == (-(-29 // stride), fps)
        if views == "dense":
            assert np.array_equal(resampled, strided[:-1])
        else:
            steps = [np.diff(frame_numbers(clip)).tolist() for clip in resampled if isinstance(clip, np.ndarray)]
            assert steps == [[stride, stride]] * 4


@pytest.mark.parametrize("fps", [5, 10, 25, 40])
def test_frames_of_an_irregular_video_are_those_on_display(tmp_path: Path, fps: int) -> None:
    source = numbered_source(tmp_path, 20, rate=100, times=TIMES)
    spec = ClipSpec(frames=4, size=16, views=5, fps=fps)
    numbers = on_display(fps)
    clips = read_clips(source, source.videos[0], spec)
    for view, pixels in zip(clips.views, clips.pixels_VTHWC, strict=True):
        assert view.real == 4
        assert frame_numbers(pixels) == numbers[view.start : view.start + 4]
    *parts, cuts = iter_clips(source, source.videos[0], replace(spec, views="dense"))
    shown = [n for part in parts if isinstance(part, np.ndarray) for n in frame_numbers(part)]
    assert shown[: len(numbers)] == numbers and set(shown[len(numbers) :]) <= {19}
    assert isinstance(cuts, ClipCuts) and cuts.rate == fps
    # The seconds at which a clip starts.
    assert [view.start / cuts.rate for view in cuts.views] == [4 * i / fps for i in range(len(cuts.views))]


def test_stride_counts_resampled_frames(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 20, rate=100, times=TIMES)
    for views in (3, "dense"):
        spec = ClipSpec(frames=4, size=16, stride=2, fps=10, views=views)  # type: ignore[arg-type]  # both are allowed
        *parts, cuts = iter_clips(source, source.videos[0], spec)
        assert isinstance(cuts, ClipCuts)
        numbers = [*on_display(10), *[19] * 4][: cuts.frames]
        for part, view in zip(parts, cuts.views, strict=True):
            assert isinstance(part, np.ndarray)
            assert frame_numbers(part) == [numbers[i] for i in view.frames(4)]


def test_a_video_that_is_short_at_the_new_rate_is_padded(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 20)
    clips = read_clips(source, source.videos[0], ClipSpec(frames=4, size=16, fps=2, views=2))
    assert [view.real for view in clips.views] == [2, 2]
    assert frame_numbers(clips.pixels_VTHWC[1]) == [0, 10, 10, 10]


def test_a_built_in_video_has_no_rate() -> None:
    source = load_source("builtin:moving-digits:1:0")
    with pytest.raises(ValueError, match=r"clip\.fps and clip\.seconds need a frame rate"):
        iter_clips(source, source.videos[0], ClipSpec(fps=10))


def test_a_video_without_times_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = numbered_source(tmp_path, 4)
    monkeypatch.setattr("data.timing.Timing.seconds", lambda self: None)
    with pytest.raises(DamagedVideo, match=r"neither time stamps nor a frame rate, which clip\.fps needs"):
        read_clips(source, source.videos[0], ClipSpec(frames=2, size=16, fps=5))


# --- scales


def test_drawn_views_have_the_scales_and_the_first_has_none(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", moving_blocks(), codec="libx264")
    source = load_source(str(tmp_path))
    spec = ClipSpec(frames=2, size=32, views=40, scales=(1, 0.875, 0.75, 0.66))
    clips = read_clips(source, source.videos[0], spec)
    plain = read_clips(source, source.videos[0], replace(spec, scales=None))
    assert np.array_equal(clips.pixels_VTHWC[0], plain.pixels_VTHWC[0]) and clips.views[0] == plain.views[0]
    assert {view.short_side for view in clips.views} == {32, 37, 43, 48}
    for view, other in zip(clips.views, plain.views, strict=True):
        # 96 x 128 pixels become short_side x short_side * 4 / 3.
        assert 0 <= view.top <= view.short_side - 32 and 0 <= view.left <= round(view.short_side * 4 / 3) - 32
        assert (view.start, view.size) == (other.start, 32)
    recorded = recorded_views(json.loads(json.dumps(describe(clips.views, spec))))
    assert recorded == clips.views
    for view, pixels in zip(recorded, clips.pixels_VTHWC, strict=True):
        frames = read_frames(tmp_path / "a.mp4", view.short_side, lambda _, v=view: v.frames(2)).pixels_THWC  # type: ignore[misc]
        assert np.array_equal(frames[:, view.top : view.top + 32, view.left : view.left + 32], pixels)


def test_a_scaled_crop_shows_its_part_of_the_frame(tmp_path: Path) -> None:
    """Pillow cuts the same square from the full frame and resizes it. Another square would differ by more than 60."""
    frame = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    make_video(tmp_path / "a.mp4", [frame] * 2, codec="libx264", crf="1")
    source = load_source(str(tmp_path))
    clips = read_clips(source, source.videos[0], ClipSpec(frames=2, size=48, views=8, scales=(0.5, 0.75)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        original = next(container.decode(video=0)).to_ndarray(format="rgb24")
    for view, pixels in list(zip(clips.views, clips.pixels_VTHWC, strict=True))[1:]:
        scale = view.short_side / 192
        side = 48 / scale
        box = (view.left / scale, view.top / scale, view.left / scale + side, view.top / scale + side)
        expected = np.asarray(Image.fromarray(original).resize((48, 48), Image.Resampling.BOX, box), np.float64)
        assert np.abs(pixels[0] - expected).mean() < 12
        assert side == pytest.approx(192 * (0.5 if view.short_side == 96 else 0.75))


def test_dense_views_are_not_scaled(tmp_path: Path) -> None:
    source = numbered_source(tmp_path, 9)
    spec = ClipSpec(frames=4, size=16, views="dense")
    assert read_clips(source, source.videos[0], replace(spec, scales=(0.5,))).views == (
        read_clips(source, source.videos[0], spec).views
    )


def test_built_in_videos_have_scales_too() -> None:
    source = load_source("builtin:moving-digits:1:0")
    clips = read_clips(source, source.videos[0], ClipSpec(views=6, scales=(0.5, 1)))
    assert {view.short_side for view in clips.views[1:]} == {64, 128}
    assert read_clip(source, source.videos[0], ClipSpec(), 0).tobytes() == clips.pixels_VTHWC[0].tobytes()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("fps", 0), ("fps", -1), ("fps", float("nan")), ("fps", float("inf")), ("fps", 1e6)]
    + [("scales", value) for value in ((), (0,), (1.1,), (-0.5, 1), (float("nan"),), (0.01,))],
)
def test_rates_and_scales_out_of_range_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"clip\.{setting} "):
        ClipSpec(**{setting: value})


# --- cached


def test_cached_clips_have_their_views_and_are_cut_again_from_the_videos(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    make_video(tmp_path / "set" / "a.mp4", numbered_frames(20, 48, 32), rate=100, times=TIMES)
    source = load_source(str(tmp_path / "set"))
    clip = ClipSpec(frames=4, size=8, views=3, fps=10, scales=(0.5, 0.75), flip=True)
    clips = read_clips(source, source.videos[0], clip)
    for keep in ("none", "raw"):
        spec: CacheSpec = replace(SPEC, clip=clip, videos=source.videos, keep_pixels=keep)
        writer = CacheWriter(tmp_path / keep, "hand", spec, 1)
        writer.begin()
        with writer.open_shard(0) as shard:
            members = {}
            for view, pixels in enumerate(clips.pixels_VTHWC):
                members |= pack_pixels(keep, view, pixels)  # type: ignore[arg-type]  # both are allowed
            *_, cuts = iter_clips(source, source.videos[0], clip)
            assert isinstance(cuts, ClipCuts)
            shard.add(source.videos[0], np.zeros((3, 2, 3, 3), int), cuts, members)
            shard.commit()
        writer.finish(None)
        writer.note({"tokenizer": "none", "videos": str(tmp_path / "set")})
        cache = TokenCache.open(writer.folder)
        assert cache.clip == clip
        assert cache.views(0) == clips.views and isinstance(cache.views(0)[0], View)
        assert cache.facts(0)["rate"] == 10
        seconds = cache.timeline(0) / cache.facts(0)["rate"]
        assert seconds[0, 0] == clips.views[0].start / 10
        assert np.array_equal(np.stack(list(clips_of(cache, {0: [0, 1, 2]}))), clips.pixels_VTHWC)
        assert cache.clips.slices(np.array([0]), np.array([1])).tolist() == [2]
