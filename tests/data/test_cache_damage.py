"""Unfinished work is completed, and no change of a finished cache goes unnoticed."""

import json
import platform
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.cache import CacheWriter, TokenCache
from data.shards import DamagedCache
from data.sources import Video
from tests.conftest import MakeCache

from .test_cache import SPEC, files_of, flipped, written_by_hand

# --- unfinished


def test_unfinished_cache_says_so(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, finish=False)
    with pytest.raises(DamagedCache, match="is unfinished; run tokenize again"):
        TokenCache(folder)


def test_folder_that_is_no_cache_says_so(tmp_path: Path) -> None:
    with pytest.raises(DamagedCache, match=r"is no cache: no manifest\.json"):
        TokenCache(tmp_path)


def test_interrupted_run_completed_later_is_the_same_byte_for_byte(tmp_path: Path, make_cache: MakeCache) -> None:
    straight = make_cache(tmp_path / "straight")
    broken = make_cache(tmp_path / "broken", only_shards=[0, 1], finish=False)
    (broken / "shards" / "000001.json").unlink()  # killed between the tar and its record
    (broken / "shards" / f"000002.tar.tmp-{platform.node()}-99999999").write_bytes(b"torn")
    kept = (broken / "shards" / "000000.tar").stat().st_mtime_ns
    completed = make_cache(tmp_path / "broken", shard_size=5)
    assert completed == broken
    assert (broken / "shards" / "000000.tar").stat().st_mtime_ns == kept, "a finished shard is not made again"
    assert files_of(broken) == files_of(straight), "and what a killed process left over is gone"


def test_only_missing_shards_are_missing(tmp_path: Path, make_cache: MakeCache) -> None:
    make_cache(tmp_path, only_shards=[1], finish=False)
    spec = json.loads(next(tmp_path.glob("*/plan.json")).read_text())["spec"]
    videos = tuple(Video(*video) for video in spec["videos"])
    writer = CacheWriter(tmp_path, "toy", replace(SPEC, tokenizer="a tokenizer", levels=None, videos=videos), 4)
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
    tar = folder / "shards" / "000001.tar"
    tar.write_bytes(flipped(tar.read_bytes(), random.Random(0)))
    with pytest.raises(DamagedCache, match=r"000001\.tar"):
        make_cache(tmp_path)
    assert not (folder / "manifest.json").exists()


def test_cache_of_damaged_videos_only_is_refused_with_the_first_reason(tmp_path: Path, make_cache: MakeCache) -> None:
    with pytest.raises(
        ValueError, match=r"none of the 2 videos can be used; the first, 0/000\.mp4: damaged for the test"
    ):
        make_cache(tmp_path, 2, skip=["0/000.mp4", "1/001.mp4"])
    assert not list(tmp_path.glob("*/manifest.json"))


def test_code_beyond_the_vocabulary_is_refused_when_the_cache_is_finished(tmp_path: Path) -> None:
    codes = np.zeros((2, 2, 2, 3, 3))
    codes[1, 1, 1, 2, 2] = SPEC.vocab_size
    writer = written_by_hand(tmp_path, SPEC, codes)
    with pytest.raises(ValueError, match="vocabulary"):
        writer.finish(None)
    assert not writer.finished


def test_code_beyond_the_vocabulary_is_refused_when_it_is_read(copy: Path) -> None:
    cache = TokenCache(copy)
    cache.vocab_size = int(cache.codes(0).max())
    with pytest.raises(DamagedCache, match="beyond the vocabulary"):
        cache.codes(0)


# --- changed


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 9},
        {"unigram_bits": 0.0},
        {"skipped": [{"path": "x", "reason": "y"}]},
        {"key": "0" * 64},
        {"spec": {}},
        {"checksum": "0" * 64},
        {"format": "arvideo-cache-2"},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_edited_manifest_is_refused(copy: Path, change: dict[str, Any]) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedCache, match=r"manifest\.json"):
        TokenCache(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}"])
def test_manifest_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCache, match=r"manifest\.json"):
        TokenCache(copy)


@pytest.mark.parametrize("file", ["manifest.json", "shards/000001.json"])
def test_every_flipped_bit_of_manifest_and_records_is_found(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        (copy / file).write_bytes(flipped(content, draw))
        with pytest.raises(DamagedCache):
            TokenCache(copy)


@pytest.mark.parametrize("file", ["shards/000001.json", "shards/000001.tar"])
def test_missing_file_of_a_cache_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(DamagedCache, match=re.escape(f"{file}: missing")):
        TokenCache(copy)


def test_shard_of_another_cache_is_refused(copy: Path, tmp_path: Path, make_cache: MakeCache) -> None:
    other = make_cache(tmp_path / "other", [Video(f"{i}", 1) for i in range(10)], keep_pixels="raw")
    for suffix in ("tar", "json"):
        shutil.copy(other / "shards" / f"000001.{suffix}", copy / "shards" / f"000001.{suffix}")
    with pytest.raises(DamagedCache, match=r"000001\.json: is not the record that the manifest names"):
        TokenCache(copy)


def test_damaged_codes_are_refused_when_read_and_by_verify(copy: Path) -> None:
    tar = copy / "shards" / "000001.tar"
    sample = json.loads(tar.with_suffix(".json").read_text())["samples"][2]
    content = bytearray(tar.read_bytes())
    offset, size, _ = sample["members"]["codes.npy"]
    content[offset + size - 1] ^= 1
    tar.write_bytes(content)
    cache = TokenCache(copy)
    cache.codes(5)
    with pytest.raises(DamagedCache, match=sample["id"]):
        cache.codes(6)
    with pytest.raises(DamagedCache, match=r"000001\.tar"):
        cache.verify()


def test_changed_codebook_is_refused(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, 2, codebook_VC=torch.ones(64, 6))
    path = folder / "codebook.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCache, match=r"codebook\.safetensors"):
        TokenCache(folder).codebook()


def test_missing_codebook_is_named(tmp_path: Path, make_cache: MakeCache) -> None:
    folder = make_cache(tmp_path, 2, codebook_VC=torch.ones(64, 6))
    (folder / "codebook.safetensors").unlink()
    with pytest.raises(DamagedCache, match=r"codebook\.safetensors"):
        TokenCache(folder).codebook()


def test_whole_cache_passes_verify_wherever_it_lies(copy: Path) -> None:
    TokenCache(copy).verify()
