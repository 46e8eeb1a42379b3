"""The token cache: its key is its content, what is unfinished or changed says so, and codes come back as they were written."""

import os
import pickle
import random
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data.cache
from data.cache import CacheSpec, CacheWriter, TokenCache, find_cache, hold_out, key_of
from data.clips import ClipSpec
from data.shards import DamagedCache, sample_id, to_npy
from data.sources import Video
from tests.conftest import MakeCache

VIDEOS = (Video("a.mp4", 5, "run", "g", "train"), Video("b.mp4", 6, "jump", "h", "test"))
SPEC = CacheSpec(
    tokenizer="fingerprint",
    codes_shape=(2, 3, 3),
    vocab_size=64,
    levels=(8, 8),
    clip=ClipSpec(frames=4, size=8, views=2),
    precision="fp32",
    encode_batch=2,
    keep_pixels="none",
    videos=VIDEOS,
)
CHANGES: dict[str, dict[str, Any]] = {
    "tokenizer": {"tokenizer": "other"},
    "grid": {"codes_shape": (2, 3, 4)},
    "vocabulary": {"vocab_size": 65},
    "levels": {"levels": (4, 16)},
    "no levels": {"levels": None},
    "frames": {"clip": replace(SPEC.clip, frames=5)},
    "size": {"clip": replace(SPEC.clip, size=9)},
    "stride": {"clip": replace(SPEC.clip, stride=2)},
    "views": {"clip": replace(SPEC.clip, views=3)},
    "flip": {"clip": replace(SPEC.clip, flip=True)},
    "precision": {"precision": "bf16"},
    "batch": {"encode_batch": 3},
    "pixels": {"keep_pixels": "raw"},
    "jpeg": {"keep_pixels": "jpeg"},
    "path": {"videos": (replace(VIDEOS[0], path="c.mp4"), VIDEOS[1])},
    "bytes": {"videos": (replace(VIDEOS[0], size=7), VIDEOS[1])},
    "label": {"videos": (replace(VIDEOS[0], label="jump"), VIDEOS[1])},
    "no label": {"videos": (replace(VIDEOS[0], label=None), VIDEOS[1])},
    "group": {"videos": (replace(VIDEOS[0], group="h"), VIDEOS[1])},
    "split": {"videos": (replace(VIDEOS[0], split="val"), VIDEOS[1])},
    "fewer videos": {"videos": VIDEOS[:1]},
    "order": {"videos": VIDEOS[::-1]},
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def all_codes(cache: TokenCache) -> np.ndarray:
    return np.stack([cache.codes(i) for i in range(len(cache))])


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def written_by_hand(caches: Path, spec: CacheSpec, codes_NVTHW: np.ndarray, shards: int | None = None) -> CacheWriter:
    """A cache of the given codes, one video per shard, not finished."""
    writer = CacheWriter(caches, "hand", spec, 1)
    writer.begin()
    for number in writer.missing()[:shards]:
        with writer.open_shard(number) as shard:
            for video in writer.videos(number):
                facts = {key: getattr(video, key) for key in ("path", "size", "label", "group", "split")}
                members = {"codes.npy": to_npy(codes_NVTHW[number].astype(spec.dtype))}
                shard.add(sample_id(video.path), members, {**facts, "padded": number == 0})
            shard.commit(skipped=[])
    return writer


# --- the key


@pytest.mark.parametrize("what", CHANGES)
def test_key_changes_with_every_part_of_the_content(what: str) -> None:
    assert key_of(replace(SPEC, **CHANGES[what]).preimage()) != key_of(SPEC.preimage())


def test_keys_of_all_changes_differ_from_each_other() -> None:
    assert len({key_of(replace(SPEC, **change).preimage()) for change in CHANGES.values()}) == len(CHANGES)


@pytest.mark.parametrize(("name", "value"), [("VERSION", "pyav-0"), ("FORMAT", "arvideo-cache-0")])
def test_key_changes_with_decoder_and_format(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    before = key_of(SPEC.preimage())
    monkeypatch.setattr(data.cache, name, value)
    assert key_of(SPEC.preimage()) != before


def test_key_does_not_depend_on_folder_name_or_shard_size(tmp_path: Path) -> None:
    one = CacheWriter(tmp_path / "a", "x", SPEC, 1)
    two = CacheWriter(tmp_path / "b" / "c", "y", SPEC, 100)
    assert one.key == two.key
    assert one.folder == tmp_path / "a" / f"x-{one.key[:12]}"


def test_same_content_under_another_name_is_the_same_cache(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, name="first")
    assert make_cache(tmp_path, name="second", shard_size=7) == folder
    assert os.listdir(tmp_path) == [folder.name]


def test_codes_do_not_depend_on_the_shard_size(tmp_path: Path, make_cache: MakeCache, cache: TokenCache) -> None:
    other = TokenCache(make_cache(tmp_path, keep_pixels="raw", shard_size=3))
    assert len(other.manifest["shards"]) == 4
    assert other.key == cache.key
    assert other.videos == cache.videos
    assert np.array_equal(all_codes(other), all_codes(cache))


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127])
def test_source_with_the_longest_name_can_have_a_cache(tmp_path: Path, name: str) -> None:
    writer = CacheWriter(tmp_path, name, SPEC, 4)
    writer.begin()
    assert writer.folder.is_dir()
    assert writer.folder.name.endswith(f"-{writer.key[:12]}")


# --- what is in it


def test_codes_and_videos_come_back_in_the_order_of_the_list(cache: TokenCache) -> None:
    assert [video.path for video in cache.videos] == [f"{i % 2}/{i:03d}.mp4" for i in range(10)]
    assert [video.size for video in cache.videos] == list(range(100, 110))
    for i, video in enumerate(cache.videos):
        expected = np.random.default_rng(int(sample_id(video.path), 16)).integers(64, size=(2, 2, 3, 3))
        assert np.array_equal(cache.codes(i), expected)
        assert cache.codes(i).dtype == np.uint16


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4"), (2**18, "<u4")])
def test_large_vocabularies_keep_every_code(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    spec = replace(SPEC, vocab_size=vocab_size, levels=None)
    codes = np.random.default_rng(0).integers(vocab_size - 300, vocab_size, (2, 2, 2, 3, 3))
    codes[0, 0, 0, 0, :2] = 0, vocab_size - 1
    writer = written_by_hand(tmp_path, spec, codes)
    writer.finish(None)
    cache = TokenCache(writer.folder)
    assert np.array_equal(all_codes(cache), codes)
    assert cache.codes(0).dtype == np.dtype(dtype)


def test_manifest_counts_videos_clips_and_codes(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache(make_cache(tmp_path, 10, skip=["0/002.mp4", "1/009.mp4"]))
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
    assert TokenCache(writer.folder).manifest["padded"] == 1


def test_unigram_bits_are_the_entropy_of_the_codes(cache: TokenCache) -> None:
    counts = Counter(all_codes(cache).ravel().tolist())
    shares = np.array(list(counts.values())) / counts.total()
    assert cache.manifest["unigram_bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert cache.manifest["codes_used"] == len(counts)
    assert cache.manifest["codes"] == counts.total()


@pytest.mark.parametrize(("count", "bits"), [(1, 0.0), (2, 1.0), (8, 3.0)])
def test_unigram_bits_of_equally_frequent_codes(tmp_path: Path, count: int, bits: float) -> None:
    spec = replace(SPEC, codes_shape=(2, 4, 4))
    writer = written_by_hand(tmp_path, spec, np.arange(2 * 2 * 32).reshape(2, 2, 2, 4, 4) % count)
    writer.finish(None)
    assert TokenCache(writer.folder).manifest["unigram_bits"] == pytest.approx(bits)


def test_hostile_paths_come_back_and_never_become_file_names(tmp_path: Path, make_cache: MakeCache) -> None:
    paths = [
        "../../a.mp4",
        "/etc/passwd",
        "a,b.c.mp4",
        "new\nline",
        "x" * 255,
        "\u00e9",
        "e\u0301",
        "\U0001f3ac",
        "\udcff",
    ]
    videos = [Video(path, 1, label=path, group=path) for path in paths]
    cache = TokenCache(make_cache(tmp_path / "caches", videos))
    assert cache.videos == videos
    assert len({all_codes(cache)[i].tobytes() for i in range(len(paths))}) == len(paths)
    for tar in (cache.folder / "shards").glob("*.tar"):
        with tarfile.open(tar) as archive:
            assert all(re.fullmatch(r"[0-9a-f]{16}\.(json|codes\.npy)", name) for name in archive.getnames())
    assert os.listdir(tmp_path) == ["caches"]


def test_raw_pixels_come_back_exactly(cache: TokenCache) -> None:
    for i, video in enumerate(cache.videos):
        rng = np.random.default_rng(int(sample_id(video.path), 16))
        rng.integers(64, size=(2, 2, 3, 3))
        assert np.array_equal(cache.pixels(i), rng.integers(256, size=(2, 4, 8, 8, 3), dtype=np.uint8))


def test_jpeg_pixels_come_back_nearly_and_each_in_its_place() -> None:
    from data.pixels import pack_pixels, unpack_pixels

    level = np.arange(3 * 4).reshape(3, 4, 1, 1, 1) * 18  # every frame of every view has its own grey
    slope = np.arange(16).reshape(1, 1, 1, 16, 1) * 2
    pixels = np.broadcast_to(level + slope, (3, 4, 16, 16, 3)).astype(np.uint8)
    members = pack_pixels("jpeg", pixels)
    assert sorted(members) == ["view00.jpg", "view01.jpg", "view02.jpg"]
    found = unpack_pixels("jpeg", members.__getitem__, ClipSpec(frames=4, size=16, views=3))
    assert found.shape == pixels.shape
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - pixels).max() <= 4


def test_jpeg_holds_clips_of_any_length_or_refuses_them_by_name() -> None:
    from data.pixels import pack_pixels, unpack_pixels

    pixels = np.zeros((1, 4200, 16, 16, 3), np.uint8)  # stacked they are higher than the 65,500 rows of a JPEG
    try:
        members = pack_pixels("jpeg", pixels)
    except ValueError as error:
        assert "jpeg" in str(error)
        return
    assert np.array_equal(unpack_pixels("jpeg", members.__getitem__, ClipSpec(frames=4200, size=16)), pixels)


def test_jpeg_cache_opens_and_a_jpeg_that_is_none_is_damage(tmp_path: Path, make_cache: MakeCache) -> None:
    from data.pixels import unpack_pixels

    cache = TokenCache(make_cache(tmp_path, 3, keep_pixels="jpeg"))
    assert cache.pixels(2).shape == (2, 4, 8, 8, 3)
    with pytest.raises(DamagedCache, match="JPEG"):
        unpack_pixels("jpeg", lambda _: b"no picture", ClipSpec(frames=4, size=8))


def test_cache_without_pixels_says_how_to_have_them(tmp_path: Path, make_cache: MakeCache) -> None:
    with pytest.raises(ValueError, match="--keep_pixels"):
        TokenCache(make_cache(tmp_path, 2)).pixels(0)


def test_geometry_of_the_codes_comes_back(tmp_path: Path, make_cache: MakeCache) -> None:
    vectors = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).T
    learned = TokenCache(make_cache(tmp_path, 2, codebook_VC=vectors))
    codebook = learned.codebook()
    assert codebook is not None
    assert torch.equal(codebook, vectors)
    assert learned.levels is None
    digits = TokenCache(make_cache(tmp_path, 2, levels=(8, 8)))
    assert digits.codebook() is None
    assert digits.levels == (8, 8)


def test_cache_survives_pickling_as_for_data_workers(cache: TokenCache) -> None:
    cache.codes(0)
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(all_codes(again), all_codes(cache))
    assert np.array_equal(again.pixels(9), cache.pixels(9))
    assert again.videos == cache.videos


# --- finding one


@pytest.fixture
def two_caches(tmp_path: Path, make_cache: MakeCache) -> tuple[Path, Path]:
    old = make_cache(tmp_path, 2, name="digits")
    new = make_cache(tmp_path, 3, name="dances")
    make_cache(tmp_path, 4, name="unfinished", finish=False)
    os.utime(old / "manifest.json", (1e9, 1e9))
    os.utime(new / "manifest.json", (2e9, 2e9))
    return old, new


def test_newest_finished_cache_is_found_without_a_name(two_caches: tuple[Path, Path]) -> None:
    old, new = two_caches
    assert find_cache(old.parent, None) == new
    os.utime(old / "manifest.json", (3e9, 3e9))
    assert find_cache(old.parent, None) == old


def test_cache_is_found_by_beginning_of_name_or_key_or_by_folder(two_caches: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in two_caches:
        key = TokenCache(folder).key
        for wanted in (folder.name, folder.name[:3], folder.name[:-6], key[:6], key[:12], key):
            assert find_cache(folder.parent, wanted) == folder
        assert find_cache(tmp_path / "elsewhere", str(folder)) == folder


def test_wanted_that_fits_two_caches_is_refused_with_both_names(two_caches: tuple[Path, Path]) -> None:
    old, new = two_caches
    with pytest.raises(ValueError, match=rf"'d' fits 2 caches in .*: {new.name}, {old.name}"):
        find_cache(old.parent, "d")


@pytest.mark.parametrize("wanted", ["nothing", "unfinished", "igits"])
def test_unknown_or_unfinished_cache_is_not_found(two_caches: tuple[Path, Path], wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"no cache '{wanted}'"):
        find_cache(two_caches[0].parent, wanted)


def test_key_that_only_begins_like_that_of_a_cache_is_not_found(two_caches: tuple[Path, Path]) -> None:
    key = TokenCache(two_caches[0]).key
    with pytest.raises(ValueError, match="no cache"):
        find_cache(two_caches[0].parent, key[:40] + "0123456789abcdef01234567")


def test_no_cache_at_all_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished cache in .*tokenize"):
        find_cache(tmp_path / "none", None)


# --- holding out


def test_videos_of_other_splits_are_held_out() -> None:
    splits = ["train", "val", None, "test", "train"]
    assert hold_out([Video(str(i), 1, split=split) for i, split in enumerate(splits)]) == ([0, 2, 4], [1, 3])


def test_without_splits_a_tenth_is_held_out_and_groups_stay_together() -> None:
    videos = [Video(f"{i:03d}", 1, group=f"g{i % 20}") for i in range(100)]
    train, held = hold_out(videos)
    assert sorted(train + held) == list(range(100))
    assert len(held) == 10
    assert len({videos[i].group for i in held}) == 2
    assert not {videos[i].group for i in held} & {videos[i].group for i in train}


def test_holding_out_does_not_depend_on_the_order_of_the_videos() -> None:
    videos = [Video(f"{i:03d}\udcff", 1) for i in range(40)]
    held = {videos[i].path for i in hold_out(videos)[1]}
    assert len(held) == 4
    assert {videos[::-1][i].path for i in hold_out(videos[::-1])[1]} == held


def test_a_single_group_is_all_trained_on() -> None:
    assert hold_out([Video("a", 1, group="g"), Video("b", 1, group="g")]) == ([0, 1], [])
