"""An unfinished cache is completed by the next run, and every change of a finished cache is found."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache import CacheWriter, TokenCache
from data.files import machine
from data.shards import DamagedCache, sample_id
from data.sources import Video
from tests.helpers.cache_contents import SPEC, damage_clip, files_of, flip_bit, written_by_hand
from tests.helpers.caches import MakeCache

# --- unfinished caches


def test_unfinished_cache_is_refused(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, finish=False)
    with pytest.raises(DamagedCache, match="unfinished.*tokenize"):
        TokenCache.open(folder)


def test_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedCache, match=r"manifest\.json is missing"):
        TokenCache.open(tmp_path)


def test_interrupted_cache_is_completed_byte_for_byte(tmp_path: Path, make_cache: MakeCache) -> None:
    reference = make_cache(tmp_path / "reference")
    partial = make_cache(tmp_path / "partial", only_shards=[0, 1], finish=False)
    # As if killed after the tar was written and before its record was.
    (partial / "shards" / "000001.json").unlink()
    (partial / "shards" / f"000002.tar.tmp-{machine()}-99999999").write_bytes(b"partial")
    time_of_shard = (partial / "shards" / "000000.tar").stat().st_mtime_ns
    completed = make_cache(tmp_path / "partial", shard_size=5)
    assert completed == partial
    assert (partial / "shards" / "000000.tar").stat().st_mtime_ns == time_of_shard, "a finished shard was made again"
    assert files_of(partial) == files_of(reference), "files of the killed process are left"


def test_missing_lists_only_missing_shards(tmp_path: Path, make_cache: MakeCache) -> None:
    make_cache(tmp_path, only_shards=[1], finish=False)
    spec = json.loads(next(tmp_path.glob("*/plan.json")).read_text())["spec"]
    videos = tuple(Video(*video) for video in spec["videos"])
    writer = CacheWriter(
        tmp_path,
        "toy",
        replace(SPEC, tokenizer="a tokenizer", codes=replace(SPEC.codes, levels=None), videos=videos),
        4,
    )
    assert writer.missing() == [0, 2]
    assert [video.path for video in writer.videos(2)] == ["0/008.mp4", "1/009.mp4"]
    assert not writer.finished


def test_cache_with_missing_shards_cannot_be_finished(tmp_path: Path) -> None:
    writer = written_by_hand(tmp_path, SPEC, np.zeros((2, 2, 2, 3, 3)), shards=1)
    with pytest.raises(ValueError, match="missing"):
        writer.finish(None)
    assert not writer.finished


def test_cache_with_a_damaged_shard_cannot_be_finished(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, finish=False)
    flip_bit(folder / "shards" / "000001.tar", 1000)
    with pytest.raises(DamagedCache, match=r"000001\.tar"):
        make_cache(tmp_path)
    assert not (folder / "manifest.json").exists()


def test_cache_without_manifest_is_completed_with_the_same_shards(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path)
    before = files_of(folder)
    (folder / "manifest.json").unlink()
    assert make_cache(tmp_path, shard_size=7) == folder
    assert files_of(folder) == before


@pytest.mark.parametrize("shard_size", [1, 7])
def test_finished_cache_does_not_need_the_plan(tmp_path: Path, shard_size: int) -> None:
    """A downloaded cache may lack the plan. The manifest has the size of the shards too."""
    written_by_hand(tmp_path, SPEC, np.zeros((2, 2, 2, 3, 3), int)).finish(None)
    (folder,) = tmp_path.iterdir()
    (folder / "plan.json").unlink(missing_ok=True)
    writer = CacheWriter(tmp_path, "again", SPEC, shard_size)
    assert writer.finished
    assert writer.missing() == []
    (folder / "shards" / "000001.tar").unlink()
    assert CacheWriter(tmp_path, "again", SPEC, shard_size).missing() == [1]


@pytest.mark.parametrize("shard_size", [1, 3, 4, 100])
def test_cache_without_manifest_and_plan_never_loses_a_video(
    tmp_path: Path, make_cache: MakeCache, shard_size: int
) -> None:
    """The size of the existing shards is then unknown, and the next run may request another size."""
    folder = make_cache(tmp_path)
    (folder / "manifest.json").unlink()
    (folder / "plan.json").unlink(missing_ok=True)
    try:
        make_cache(tmp_path, shard_size=shard_size)
    except DamagedCache as error:
        assert str(folder) in str(error)
    else:
        cache = TokenCache.open(folder)
        assert [video.path for video in cache.videos] == [f"{i % 2}/{i:03d}.mp4" for i in range(10)]


def test_cache_of_damaged_videos_only_is_refused_with_the_first_reason(tmp_path: Path, make_cache: MakeCache) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 videos .*0/000\.mp4: damaged for the test"):
        make_cache(tmp_path, 2, skip=["0/000.mp4", "1/001.mp4"])
    assert not list(tmp_path.glob("*/manifest.json"))


# --- changed caches


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 9},
        {"unigram_bits": 0.0},
        {"skipped": [{"path": "x", "reason": "y"}]},
        {"key": "0" * 64},
        {"spec": {}},
        {"checksum": "0" * 64},
        {"format": "arvideo-cache-1"},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_edited_manifest_is_refused(copy: Path, change: dict[str, Any]) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedCache, match=r"manifest\.json"):
        TokenCache.open(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}"])
def test_invalid_manifest_is_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCache, match=r"manifest\.json"):
        TokenCache.open(copy)


@pytest.mark.parametrize("file", ["shards/000001.json", "shards/000001.tar"])
def test_missing_file_of_a_cache_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(DamagedCache, match=re.escape(f"{file}: missing")):
        TokenCache.open(copy)


def test_shard_of_another_cache_is_refused(copy: Path, tmp_path: Path, make_cache: MakeCache) -> None:
    other = make_cache(tmp_path / "other", [Video(f"{i}", 1) for i in range(10)], keep_pixels="raw")
    for suffix in ("tar", "json"):
        shutil.copy(other / "shards" / f"000001.{suffix}", copy / "shards" / f"000001.{suffix}")
    with pytest.raises(DamagedCache, match=r"000001\.json: .*manifest"):
        TokenCache.open(copy)


def test_damaged_codes_are_refused_when_read_and_by_verify(copy: Path) -> None:
    damage_clip(copy, 6)
    cache = TokenCache.open(copy)
    cache.codes(5)
    sample = rf"000001\.tar: sample {sample_id('0/006.mp4')} \(0/006\.mp4\), codes\.npy"
    with pytest.raises(DamagedCache, match=sample):
        cache.codes(6)
    with pytest.raises(DamagedCache, match=sample):
        cache.verify()


def test_changed_codebook_is_refused(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, 2, codebook_VC=np.ones((64, 6), np.float32))
    path = folder / "codebook.safetensors"
    flip_bit(path, path.stat().st_size - 2)
    with pytest.raises(DamagedCache, match=r"codebook\.safetensors"):
        TokenCache.open(folder).codebook()


def test_missing_codebook_is_named(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, 2, codebook_VC=np.ones((64, 6), np.float32))
    (folder / "codebook.safetensors").unlink()
    with pytest.raises(DamagedCache, match=r"codebook\.safetensors"):
        TokenCache.open(folder).codebook()


def test_intact_copy_of_a_cache_passes_verify(copy: Path) -> None:
    TokenCache.open(copy).verify()
