"""Dense views: each video has as many clips as cover it, cut and cached at the recorded positions."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.cache import CacheWriter, TokenCache
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, View, iter_clips, read_clip, read_clips
from data.decoding import DamagedVideo
from data.loading import BatchPlan, TokenDataset, evaluation_batches
from data.shards import sample_id
from data.sources import load_source
from tests.helpers.cache_contents import SPEC, written_by_hand
from tests.helpers.caches import make_cache
from tests.helpers.videos import frame_numbers, make_video, numbered_frames

DENSE = ClipSpec(frames=4, size=16, views="dense")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """Cache of twelve videos of one to five clips."""
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("dense"), 12, views="dense", keep_pixels="raw"))


# --- cutting


@pytest.mark.parametrize(
    ("count", "stride", "clips"),
    [
        (8, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (9, 1, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 8, 8]]),
        (3, 1, [[0, 1, 2, 2]]),
        (12, 2, [[0, 2, 4, 6], [8, 10, 10, 10]]),
        (7, 3, [[0, 3, 6, 6]]),
    ],
)
def test_dense_views_cover_the_video_from_first_frame_to_last(
    tmp_path: Path, count: int, stride: int, clips: list[list[int]]
) -> None:
    make_video(tmp_path / "a.mp4", numbered_frames(count, 32, 48))
    source = load_source(str(tmp_path))
    *parts, cuts = iter_clips(source, source.videos[0], replace(DENSE, stride=stride))
    assert [frame_numbers(part) for part in parts if isinstance(part, np.ndarray)] == clips
    assert isinstance(cuts, ClipCuts)
    assert (cuts.frames, cuts.rate) == (count, 10.0)
    for view, numbers in zip(cuts.views, clips, strict=True):
        assert view.frames(4) == numbers
        assert view.real == len(set(numbers))


def test_dense_views_have_the_middle_crop_and_are_never_mirrored(video_folder: Path) -> None:
    source = load_source(str(video_folder))
    for video in source.videos:
        clips = read_clips(source, video, replace(DENSE, size=32, flip=True))
        assert [view.start for view in clips.views] == [0, 4, 8, 12, 16]
        assert {(view.top, view.left, view.flip) for view in clips.views} == {(0, 5, False)}


def test_one_dense_view_can_be_read_alone(video_folder: Path) -> None:
    source = load_source(str(video_folder))
    clips = read_clips(source, source.videos[0], DENSE).pixels_VTHWC
    for view in range(5):
        assert np.array_equal(read_clip(source, source.videos[0], DENSE, view), clips[view])
    with pytest.raises(IndexError, match="has no view 5"):
        read_clip(source, source.videos[0], DENSE, 5)


def test_damage_after_some_dense_views_is_raised_after_these_views(tmp_path: Path) -> None:
    """MP4 has no checksums that could reveal the damage before the first frame is decoded."""
    (tmp_path / "set").mkdir()
    draw = np.random.default_rng(0)
    frames = [draw.integers(256, size=(64, 64, 3), dtype=np.uint8) for _ in range(20)]
    video = make_video(tmp_path / "set" / "a.mp4", frames)
    content = bytearray(video.read_bytes())
    start = len(content) * 3 // 4
    content[start : start + 200] = draw.bytes(200)
    video.write_bytes(content)
    source = load_source(str(tmp_path / "set"))
    parts = []
    with pytest.raises(DamagedVideo):
        for part in iter_clips(source, source.videos[0], DENSE):
            parts.append(part)
    assert parts
    assert not any(isinstance(part, ClipCuts) for part in parts)


def test_built_in_clip_is_cut_like_a_video() -> None:
    source = load_source("builtin:moving-digits:2:0")
    *parts, cuts = iter_clips(source, source.videos[0], ClipSpec(frames=8, size=64, views="dense"))
    assert isinstance(cuts, ClipCuts)
    assert (len(parts), cuts.frames, cuts.rate) == (4, 32, None)


# --- caching


def test_videos_have_different_numbers_of_views(dense: TokenCache) -> None:
    assert len(set(dense.views_N.tolist())) >= 3
    assert dense.manifest["clips"] == dense.views_N.sum()
    assert dense.manifest["codes"] == dense.views_N.sum() * 18
    for i, count in enumerate(dense.views_N):
        assert dense.codes(i).shape == (count, 2, 3, 3)


def test_codes_and_pixels_of_every_view_are_read_back(dense: TokenCache) -> None:
    rows = np.repeat(np.arange(12), dense.views_N)
    views = np.concatenate([np.arange(count) for count in dense.views_N])
    order = np.random.default_rng(0).permutation(len(rows))
    gathered = dense.clips.gather(rows[order], views[order])
    for row, view, codes in zip(rows[order], views[order], gathered, strict=True):
        rng = np.random.default_rng(int(sample_id(dense.videos[row].path), 16))
        count = int(rng.integers(1, 6))
        assert count == dense.views_N[row]
        assert np.array_equal(rng.integers(64, size=(count, 2, 3, 3))[view], codes)
        assert np.array_equal(
            rng.integers(256, size=(count, 4, 8, 8, 3), dtype=np.uint8)[view], dense.pixels(row, view)
        )


@pytest.mark.parametrize("beyond", [0, 1, 100, -1])
def test_view_out_of_range_is_an_error_not_a_view_of_the_next_video(dense: TokenCache, beyond: int) -> None:
    for row, count in enumerate(dense.views_N):
        view = -1 if beyond < 0 else int(count) + beyond
        with pytest.raises(IndexError, match="view"):
            dense.clips.gather(np.array([row]), np.array([view]))
        with pytest.raises(IndexError, match="view"):
            dense.pixels(row, view)


@pytest.mark.parametrize(("views", "middle"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (301, 150)])
def test_canonical_view_is_the_middle_one(tmp_path: Path, views: int, middle: int) -> None:
    spec = replace(SPEC, clip=replace(SPEC.clip, views="dense"))
    codes = np.arange(views).reshape(-1, 1, 1, 1) % 64 * np.ones((1, 2, 3, 3), np.int64)
    writer = written_by_hand(tmp_path, spec, [codes, codes[:1]])
    writer.finish(None)
    cache = TokenCache.open(writer.folder)
    assert cache.canonical(0) == middle
    assert cache.canonical(1) == 0
    (batch,) = evaluation_batches(cache, [1, 0], 2)
    assert batch["codes_BTHW"][:, 0, 0, 0].tolist() == [0, middle % 64]


def test_timeline_lists_the_frames_that_each_clip_covers(video_folder: Path, tmp_path: Path) -> None:
    source = load_source(str(shutil.copytree(video_folder / "left", tmp_path / "set")))
    for stride, timeline in ((1, [[0, 6], [6, 12], [12, 18], [18, 20]]), (3, [[0, 18], [18, 20]])):
        clip = ClipSpec(frames=6, size=8, stride=stride, views="dense")
        spec = replace(SPEC, clip=clip, videos=source.videos[:1])
        *_, cuts = iter_clips(source, source.videos[0], clip)
        assert isinstance(cuts, ClipCuts)
        writer = CacheWriter(tmp_path / str(stride), "hand", spec, 1)
        writer.begin()
        with writer.open_shard(0) as shard:
            shard.add(source.videos[0], np.zeros((len(cuts.views), 2, 3, 3), int), cuts, {})
            shard.commit()
        writer.finish(None)
        cache = TokenCache.open(writer.folder)
        assert cache.timeline(0).tolist() == timeline
        assert cache.views(0) == cuts.views
        assert all(isinstance(view, View) for view in cache.views(0))
        assert cache.facts(0)["frames"] == 20


def test_training_draws_every_view_of_the_given_videos_only(dense: TokenCache) -> None:
    rows = [2, 5, 7, 8, 11]
    dataset = TokenDataset(dense, rows, BatchPlan(samples=5, batch_size=5, seed=0))
    codes_of: dict[int, set[bytes]] = {row: set() for row in rows}
    for step in range(80):
        batch = dataset[step]
        for row, codes in zip(batch["row_B"].tolist(), batch["codes_BTHW"], strict=True):
            codes_of[row].add(codes.tobytes())
    assert codes_of == {row: {view.tobytes() for view in dense.codes(row)} for row in rows}
