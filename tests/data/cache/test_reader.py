"""TokenCache returns codes, pixels and facts of a video as they were written, and find_cache finds a cache."""

import json
import os
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.cache import CacheWriter, TokenCache, find_cache
from data.clip_spec import ClipSpec
from data.pixels import pack_pixels, unpack_pixels
from data.shards import DamagedCache, sample_id
from data.sources import Video
from tests.helpers.cache_contents import SPEC, all_codes, expected_codes, some_cuts, written_by_hand
from tests.helpers.caches import MakeCache


def test_codes_do_not_depend_on_the_shard_size(tmp_path: Path, make_cache: MakeCache, cache: TokenCache) -> None:
    other = TokenCache.open(make_cache(tmp_path, keep_pixels="raw", shard_size=3))
    assert len(other.manifest["shards"]) == 4
    assert other.key == cache.key
    assert other.videos == cache.videos
    assert np.array_equal(all_codes(other), all_codes(cache))


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127])
def test_name_of_255_bytes_is_shortened(tmp_path: Path, name: str) -> None:
    writer = CacheWriter(tmp_path, name, SPEC, 4)
    writer.begin()
    assert writer.folder.is_dir()
    assert writer.folder.name.endswith(f"-{writer.key[:12]}")


# --- content


def test_codes_and_videos_are_in_the_order_of_the_list(cache: TokenCache) -> None:
    assert [video.path for video in cache.videos] == [f"{i % 2}/{i:03d}.mp4" for i in range(10)]
    assert [video.size for video in cache.videos] == list(range(100, 110))
    for i, video in enumerate(cache.videos):
        assert np.array_equal(cache.codes(i), expected_codes(video.path))
        assert cache.codes(i).dtype == np.uint16


def test_manifest_counts_videos_clips_and_codes(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 10, skip=["0/002.mp4", "1/009.mp4"]))
    assert len(cache) == cache.manifest["samples"] == 8
    assert cache.manifest["clips"] == 16
    assert cache.manifest["codes"] == 16 * 18
    assert cache.manifest["skipped"] == [
        {"path": path, "reason": "damaged for the test"} for path in ("0/002.mp4", "1/009.mp4")
    ]
    assert "0/002.mp4" not in [video.path for video in cache.videos]
    assert len(cache.spec["videos"]) == 10


def test_manifest_counts_padded_videos(tmp_path: Path) -> None:
    writer = written_by_hand(tmp_path, SPEC, np.zeros((2, 2, 2, 3, 3)))
    writer.finish(None)
    assert TokenCache.open(writer.folder).manifest["padded"] == 1


@pytest.mark.parametrize(
    ("frames", "stride", "slices", "expected"),
    [(8, 1, 4, 2), (9, 1, 3, 2), (9, 1, 9, 4), (9, 2, 3, 2), (49, 1, 7, 2), (8, 2, 8, 2), (4, 2, 4, 2), (5, 4, 2, 1)],
)
def test_slices_with_valid_frames_are_counted(
    tmp_path: Path, frames: int, stride: int, slices: int, expected: int
) -> None:
    """The video has four frames. If the slices do not divide the frames, the tokenizer is causal and slice 0 is frame 0."""
    clip = ClipSpec(frames=frames, size=8, views=1, stride=stride)
    writer = written_by_hand(
        tmp_path,
        replace(SPEC, clip=clip, codes=replace(SPEC.codes, grid=(slices, 3, 3))),
        np.zeros((2, 1, slices, 3, 3)),
    )
    writer.finish(None)
    assert TokenCache.open(writer.folder).clips.slices(np.array([0, 1]), np.array([0, 0])).tolist() == [expected] * 2


def test_cache_may_contain_a_shard_without_samples(tmp_path: Path, make_cache: MakeCache) -> None:
    # All videos of the second of three shards.
    damaged = ["0/004.mp4", "1/005.mp4", "0/006.mp4", "1/007.mp4"]
    cache = TokenCache.open(make_cache(tmp_path, 10, skip=damaged))
    assert [video.path[2:5] for video in cache.videos] == ["000", "001", "002", "003", "008", "009"]
    assert [entry["path"] for entry in cache.manifest["skipped"]] == damaged
    assert [entry["samples"] for entry in cache.manifest["shards"]] == [4, 0, 2]
    assert np.array_equal(cache.codes(4), expected_codes("0/008.mp4"))
    cache.verify()


def test_documentation_lists_every_field_of_manifest_and_records(tmp_path: Path, make_cache: MakeCache) -> None:
    page = (Path(__file__).parents[3] / "docs" / "cache.md").read_text()
    folder = make_cache(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    record = json.loads((folder / "shards" / "000000.json").read_text())
    for title, fields in (("manifest.json", manifest), ("spec", manifest["spec"]), ("Record of a shard", record)):
        table = page.partition(f"### {title}\n")[2].partition("###")[0]
        names = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        # `compared` exists only in bf16, and `codes_per_place` only if there are several.
        assert set(re.findall(r"\w+", " ".join(names))) - {"compared", "codes_per_place"} == set(fields)


def test_unigram_bits_are_the_entropy_of_the_codes(cache: TokenCache) -> None:
    counts = Counter(all_codes(cache).ravel().tolist())
    shares = np.array(list(counts.values())) / counts.total()
    assert cache.manifest["unigram_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert cache.manifest["codes_used"] == len(counts)
    assert cache.manifest["codes"] == counts.total()


@pytest.mark.parametrize(("count", "bits"), [(1, 0.0), (2, 1.0), (8, 3.0)])
def test_unigram_bits_of_equally_frequent_codes(tmp_path: Path, count: int, bits: float) -> None:
    spec = replace(SPEC, codes=replace(SPEC.codes, grid=(2, 4, 4)))
    writer = written_by_hand(tmp_path, spec, np.arange(2 * 2 * 32).reshape(2, 2, 2, 4, 4) % count)
    writer.finish(None)
    assert TokenCache.open(writer.folder).manifest["unigram_bits"] == pytest.approx(bits)


def test_raw_pixels_are_returned_exactly(cache: TokenCache) -> None:
    for i, video in enumerate(cache.videos):
        rng = np.random.default_rng(int(sample_id(video.path), 16))
        rng.integers(64, size=(2, 2, 3, 3))
        expected = rng.integers(256, size=(2, 4, 8, 8, 3), dtype=np.uint8)
        for view in (1, 0):
            assert np.array_equal(cache.pixels(i, view), expected[view])


@pytest.mark.parametrize("keep", ["raw", "jpeg"])
def test_pixels_of_a_missing_view_are_an_error(tmp_path: Path, make_cache: MakeCache, keep: str) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 2, keep_pixels=keep))
    for view in (2, -1):
        with pytest.raises(IndexError, match=f"video 0 has 2 views, got {view}"):
            cache.pixels(0, view)


def test_jpeg_pixels_are_returned_with_small_errors_and_in_order() -> None:
    # A different grey for every frame of every view.
    level = np.arange(3 * 4).reshape(3, 4, 1, 1, 1) * 18
    slope = np.arange(16).reshape(1, 1, 1, 16, 1) * 2
    pixels = np.broadcast_to(level + slope, (3, 4, 16, 16, 3)).astype(np.uint8)
    members = {name: content for v in range(3) for name, content in pack_pixels("jpeg", v, pixels[v]).items()}
    assert sorted(members) == ["view00.jpg", "view01.jpg", "view02.jpg"]
    for view in range(3):
        unpacked = unpack_pixels("jpeg", members.__getitem__, ClipSpec(frames=4, size=16, views=3), view)
        assert (unpacked.shape, unpacked.dtype) == ((4, 16, 16, 3), np.uint8)
        assert np.abs(unpacked.astype(int) - pixels[view]).max() <= 4


def test_jpeg_refuses_clips_that_are_too_long() -> None:
    # Stacked, the frames exceed the 65,500 rows of a JPEG.
    pixels = np.zeros((4200, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="4200 .*16 .*65,?500"):
        pack_pixels("jpeg", 0, pixels)
    assert len(pack_pixels("jpeg", 0, pixels[:4000])) == 1


def test_invalid_jpeg_is_damage(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 3, keep_pixels="jpeg"))
    assert cache.pixels(2, 1).shape == (4, 8, 8, 3)
    other_size = pack_pixels("jpeg", 0, np.zeros((4, 16, 8, 3), np.uint8))["view00.jpg"]
    for content in (b"no picture", b"", other_size, other_size[:100]):
        with pytest.raises(DamagedCache, match="JPEG"):
            unpack_pixels("jpeg", {"view00.jpg": content}.__getitem__, ClipSpec(frames=4, size=8), 0)


def test_cache_without_pixels_names_the_flag(tmp_path: Path, make_cache: MakeCache) -> None:
    with pytest.raises(ValueError, match="--keep_pixels"):
        TokenCache.open(make_cache(tmp_path, 2)).pixels(0, 0)


def test_codebook_and_levels_are_returned(tmp_path: Path, make_cache: MakeCache) -> None:
    # Transposed, so that it is not contiguous.
    vectors = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32).T
    learned = TokenCache.open(make_cache(tmp_path, 2, codebook_VC=vectors))
    codebook = learned.codebook()
    assert codebook is not None
    assert np.array_equal(codebook, vectors)
    assert learned.layout.levels is None
    digits = TokenCache.open(make_cache(tmp_path, 2, levels=((8, 8),)))
    assert digits.codebook() is None
    assert digits.layout.levels == ((8, 8),)


def test_facts_and_views_of_a_video_are_returned(cache: TokenCache) -> None:
    for i in (0, 7):
        facts = cache.facts(i)
        assert Video(**{key: facts[key] for key in ("path", "size", "label", "group", "split")}) == cache.videos[i]
        assert (facts["frames"], facts["rate"]) == (8, 25.0)
        assert cache.views(i) == some_cuts(2).views
        assert cache.timeline(i).tolist() == [[0, 4], [4, 8]]
        assert cache.canonical(i) == 0


def test_cache_can_be_pickled_for_data_workers(cache: TokenCache) -> None:
    # Open a file.
    cache.codes(0)
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(all_codes(again), all_codes(cache))
    assert np.array_equal(again.pixels(9, 1), cache.pixels(9, 1))
    assert again.videos == cache.videos


# --- find_cache


@pytest.fixture
def two_caches(tmp_path: Path, make_cache: MakeCache) -> tuple[Path, Path]:
    old = make_cache(tmp_path, 2, name="digits")
    new = make_cache(tmp_path, 3, name="dances")
    make_cache(tmp_path, 4, name="unfinished", finish=False)
    os.utime(old / "manifest.json", (1e9, 1e9))
    os.utime(new / "manifest.json", (2e9, 2e9))
    return old, new


def test_newest_finished_cache_is_the_default(two_caches: tuple[Path, Path]) -> None:
    old, new = two_caches
    assert find_cache(old.parent, None) == str(new)
    os.utime(old / "manifest.json", (3e9, 3e9))
    assert find_cache(old.parent, None) == str(old)


def test_cache_is_found_by_beginning_of_name_or_key_or_by_folder(two_caches: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in two_caches:
        key = TokenCache.open(folder).key
        for name in (folder.name, folder.name[:3], folder.name[:-6], key[:6], key[:12], key):
            assert find_cache(folder.parent, name) == str(folder)
        assert find_cache(tmp_path / "elsewhere", str(folder)) == str(folder)


def test_ambiguous_name_is_refused_with_both_matches(two_caches: tuple[Path, Path]) -> None:
    old, new = two_caches
    with pytest.raises(ValueError, match=rf"'d' .*2 caches .*{new.name}, {old.name}"):
        find_cache(old.parent, "d")


@pytest.mark.parametrize("name", ["nothing", "unfinished", "igits"])
def test_unknown_or_unfinished_cache_is_not_found(two_caches: tuple[Path, Path], name: str) -> None:
    with pytest.raises(ValueError, match=f"no cache '{name}'"):
        find_cache(two_caches[0].parent, name)


def test_damaged_cache_does_not_hide_others(two_caches: tuple[Path, Path]) -> None:
    old, new = two_caches
    (old / "manifest.json").write_text("{")
    assert find_cache(new.parent, new.name) == str(new)
    assert find_cache(new.parent, "danc") == str(new)


def test_key_that_differs_at_its_end_is_not_found(two_caches: tuple[Path, Path]) -> None:
    key = TokenCache.open(two_caches[0]).key
    with pytest.raises(ValueError, match="no cache"):
        find_cache(two_caches[0].parent, key[:40] + "0123456789abcdef01234567")


def test_without_any_cache_the_error_names_tokenize(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished cache in .*tokenize"):
        find_cache(tmp_path / "none", None)
