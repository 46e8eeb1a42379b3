"""ClipIndex.gather, the source of every batch, returns the right clips from any number of shards or raises an error."""

import os
import pickle
import random
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import data.cache.storage
from data.cache import DamagedCache, TokenCache
from data.loading import BatchPlan, TokenDataset
from tests.helpers.cache_contents import damage_clip, expected_codes, find_clip, flip_bit
from tests.helpers.caches import MakeCache


@pytest.fixture
def folder(tmp_path: Path, make_cache: MakeCache) -> Path:
    """Ten videos of two views in ten shards."""
    return make_cache(tmp_path, shard_size=1)


def expected(cache: TokenCache, rows: list[int], views: list[int]) -> np.ndarray:
    return np.stack([expected_codes(cache.videos[row].path)[view] for row, view in zip(rows, views, strict=True)])


def gathered(cache: TokenCache, rows: list[int], views: list[int]) -> np.ndarray:
    return cache.clips.gather(np.array(rows, int), np.array(views, int))


def test_any_clips_in_any_order_and_several_times(cache: TokenCache) -> None:
    rows, views = [9, 0, 0, 4, 3, 9, 9], [1, 0, 1, 1, 0, 1, 0]
    assert np.array_equal(gathered(cache, rows, views), expected(cache, rows, views))
    assert gathered(cache, rows, views).dtype == np.dtype("<u2")


def test_empty_batch(cache: TokenCache) -> None:
    assert gathered(cache, [], []).shape == (0, 2, 3, 3)


def test_result_is_writable_and_not_shared_with_the_cache(cache: TokenCache) -> None:
    first = gathered(cache, [0, 1], [0, 0])
    first[:] = 7
    assert np.array_equal(gathered(cache, [0, 1], [0, 0]), expected(cache, [0, 1], [0, 0]))


@pytest.mark.parametrize(("row", "view"), [(0, 2), (9, 2), (3, -1), (3, 1000)])
def test_missing_view_is_an_error(cache: TokenCache, row: int, view: int) -> None:
    with pytest.raises(IndexError, match=f"video {row} has 2 views, got {view}"):
        gathered(cache, [1, row], [0, view])


def test_missing_video_is_an_error(cache: TokenCache) -> None:
    with pytest.raises(IndexError):
        gathered(cache, [10], [0])


def test_every_flipped_bit_of_a_clip_is_found_and_other_clips_can_be_read(copy: Path) -> None:
    cache = TokenCache.open(copy)
    draw = random.Random(0)
    for _ in range(100):
        row, view = draw.randrange(10), draw.randrange(2)
        tar, offset, size = find_clip(cache, row, view)
        position, bit = offset + draw.randrange(size), draw.randrange(8)
        flip_bit(tar, position, bit)
        others = [(r, v) for r in range(10) for v in range(2) if (r, v) != (row, view)]
        rows, views = ([pair[i] for pair in others] for i in range(2))
        assert np.array_equal(gathered(cache, rows, views), expected(cache, rows, views))
        with pytest.raises(DamagedCache, match=rf"{tar.name}: view {view} of video {row} .*verify"):
            gathered(cache, [*rows, row], [*views, view])
        flip_bit(tar, position, bit)


def test_training_data_set_reports_damage(copy: Path) -> None:
    damage_clip(copy, 6, 1)
    cache = TokenCache.open(copy)
    dataset = TokenDataset(cache, range(10), BatchPlan(samples=10, batch_size=10, seed=0))
    with pytest.raises(DamagedCache, match=r"000001\.tar: view 1 of video 6"):
        for step in range(20):
            dataset[step]


def test_without_checksums_damage_inside_the_vocabulary_is_not_found(copy: Path) -> None:
    damage_clip(copy, 3)
    cache = TokenCache.open(copy, checksums=False)
    codes_Bthw = gathered(cache, [3, 4], [0, 0])
    assert codes_Bthw[0, 0, 0, 0] == expected(cache, [3], [0])[0, 0, 0, 0] ^ 1
    assert np.array_equal(codes_Bthw[1], expected(cache, [4], [0])[0])


def test_without_checksums_a_code_outside_the_vocabulary_is_still_refused(copy: Path) -> None:
    cache = TokenCache.open(copy, checksums=False)
    tar, offset, _ = find_clip(cache, 3, 0)
    # In the high byte, the flipped bit adds or subtracts 256.
    flip_bit(tar, offset + 1)
    with pytest.raises(DamagedCache, match=r"000000\.tar: view 0 of video 3"):
        gathered(cache, [4, 3], [0, 0])


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("rest", ["nothing", "half a clip", "all but a byte"])
def test_file_that_is_truncated_while_open_is_an_error(folder: Path, checksums: bool, rest: str) -> None:
    cache = TokenCache.open(folder, checksums=checksums)
    rows, views = list(range(10)), [1] * 10
    # Open all files.
    gathered(cache, rows, views)
    tar, offset, size = find_clip(cache, 7, 1)
    os.truncate(tar, {"nothing": 0, "half a clip": offset + size // 2, "all but a byte": offset + size - 1}[rest])
    with pytest.raises(DamagedCache, match=r"000007\.tar: view 1 of video 7"):
        gathered(cache, rows, views)
    assert np.array_equal(gathered(cache, rows[:7], views[:7]), expected(cache, rows[:7], views[:7]))


def test_file_that_is_deleted_before_it_is_opened_is_named(folder: Path) -> None:
    cache = TokenCache.open(folder)
    (folder / "shards" / "000004.tar").unlink()
    with pytest.raises(DamagedCache, match=r"000004\.tar: missing"):
        gathered(cache, [3, 4], [0, 0])


def test_cache_that_is_moved_while_open_stays_readable(folder: Path, tmp_path: Path) -> None:
    cache = TokenCache.open(folder)
    rows, views = list(range(10)), [0] * 10
    before = gathered(cache, rows, views)
    folder.rename(tmp_path / "moved")
    assert np.array_equal(gathered(cache, rows, views), before)


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_no_more_files_are_open_than_the_limit_and_all_are_closed_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(data.cache.storage, "_MAX_OPEN_FILES", limit)
    before = psutil.Process().num_fds()
    cache = TokenCache.open(folder)
    draw = random.Random(0)
    for _ in range(30):
        rows, views = [draw.randrange(10) for _ in range(12)], [draw.randrange(2) for _ in range(12)]
        assert np.array_equal(gathered(cache, rows, views), expected(cache, rows, views))
        assert psutil.Process().num_fds() <= before + limit
    del cache
    # The limit is shared with caches that other tests left open.
    assert psutil.Process().num_fds() <= before


def test_threads_read_correctly_while_files_are_opened_and_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread must not close a file that another thread reads, because the system would give its descriptor to the next file."""
    monkeypatch.setattr(data.cache.storage, "_MAX_OPEN_FILES", 2)
    cache = TokenCache.open(folder)
    errors: list[BaseException] = []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(150):
                rows, views = [draw.randrange(10) for _ in range(8)], [draw.randrange(2) for _ in range(8)]
                assert np.array_equal(gathered(cache, rows, views), expected(cache, rows, views))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_clip_index_is_pickled_without_files_and_videos(folder: Path) -> None:
    cache = TokenCache.open(folder)
    rows, views = list(range(10)), [1] * 10
    before = gathered(cache, rows, views)
    content = pickle.dumps(cache.clips)
    del cache
    again = pickle.loads(content)
    assert np.array_equal(again.gather(np.array(rows), np.array(views)), before)
    assert len(content) < 5000, "the pickle contains the list of videos or the records"
