"""Every code of every vocabulary is read as it was written. A code outside the vocabulary is never written or read."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import CacheSpec, DamagedCache, TokenCache
from data.cache.layout import CodeLayout
from data.cache.writer import CacheWriter
from data.loading import BatchPlan, TokenDataset, batches, evaluation_batches
from data.shards import ShardWriter, sample_id, to_npy
from tests.helpers.cache_contents import SPEC, all_codes, clip_checksums, rewritten_manifest, some_cuts, written_by_hand

SIZES = [(2**8, "<u2"), (2**10, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4"), (2**18, "<u4")]


def spec_of(vocab_size: int) -> CacheSpec:
    return replace(SPEC, codes=CodeLayout((2, 3, 3), vocab_size))


def extreme_codes(vocab_size: int) -> np.ndarray:
    """Codes of two videos, (2, V, t, h, w), with the first and the last of the vocabulary."""
    codes = np.random.default_rng(0).integers(max(0, vocab_size - 300), vocab_size, (2, 2, 2, 3, 3))
    codes[:, :, 0, 0, 0], codes[:, :, 1, 2, 2] = 0, vocab_size - 1
    return codes


def cache_with_code_outside(tmp_path: Path, vocab_size: int, row: int = 1, view: int = 1) -> TokenCache:
    """A finished cache with valid checksums, in which one code equals the size of the vocabulary."""
    codes = extreme_codes(vocab_size)
    codes[row, view, 1, 2, 1] = vocab_size
    writer = written_by_hand(tmp_path, spec_of(vocab_size + 1), codes)
    writer.finish(None)
    spec = json.loads((writer.folder / "manifest.json").read_text())["spec"]
    rewritten_manifest(writer.folder, spec={**spec, "vocab_size": vocab_size})
    return TokenCache.open(writer.folder)


def shard_with_code_outside(writer: CacheWriter, number: int, vocab_size: int) -> None:
    """Write a shard that CacheWriter would refuse: one code equals the size of the vocabulary."""
    codes_Vthw = extreme_codes(vocab_size)[number].astype(writer.spec.codes.dtype)
    codes_Vthw[1, 1, 2, 2] = vocab_size
    (video,) = writer.videos(number)
    facts = {"video": number, "views": 2, "padded": 0, "frames": 8}
    with ShardWriter(writer.shards, number, tuple(facts)) as shard:
        shard.add(sample_id(video.path), {"codes.npy": to_npy(codes_Vthw), "json": b"{}"}, facts)
        shard.commit(skipped=[], **clip_checksums([codes_Vthw]))


@pytest.mark.parametrize(("vocab_size", "dtype"), SIZES)
def test_every_code_is_read_as_written(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    codes = extreme_codes(vocab_size)
    writer = written_by_hand(tmp_path, spec_of(vocab_size), codes)
    writer.finish(None)
    cache = TokenCache.open(writer.folder)
    assert cache.codes(0).dtype == np.dtype(dtype)
    assert np.array_equal(all_codes(cache), codes)
    gathered = cache.clips.gather(np.array([1, 0, 1]), np.array([0, 1, 1]))
    assert gathered.dtype == np.dtype(dtype)
    assert np.array_equal(gathered, codes[[1, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize("vocab_size", [2**8, 2**16, 2**18])
def test_every_code_reaches_the_model_as_int64(tmp_path: Path, vocab_size: int) -> None:
    codes = extreme_codes(vocab_size)
    writer = written_by_hand(tmp_path, spec_of(vocab_size), codes)
    writer.finish(None)
    cache = TokenCache.open(writer.folder)
    plan = BatchPlan(samples=2, batch_size=2, seed=0)
    for batch, draw in zip(
        batches(TokenDataset(cache, [0, 1], plan), range(3), 0), map(plan.draw, range(3)), strict=True
    ):
        assert batch["codes_BTHW"].dtype == torch.int64
        expected = codes[draw.rows_B, (2 * draw.view_B).astype(int)]
        assert np.array_equal(batch["codes_BTHW"].numpy(), expected)
    (batch,) = evaluation_batches(cache, [0, 1], 2)
    assert batch["codes_BTHW"].dtype == torch.int64
    assert np.array_equal(batch["codes_BTHW"].numpy(), codes[:, 0])


@pytest.mark.parametrize("vocab_size", [2**8, 2**10, 2**16, 2**18])
@pytest.mark.parametrize("kind", ["first", "far", "negative", "2**32"])
def test_code_outside_the_vocabulary_is_refused_when_written(tmp_path: Path, vocab_size: int, kind: str) -> None:
    codes = extreme_codes(vocab_size)
    code = {"first": vocab_size, "far": 2**17 + vocab_size, "negative": -1, "2**32": 2**32}[kind]
    codes[1, 1, 1, 2, 1] = code
    with pytest.raises(ValueError, match=rf"0\.\.{vocab_size - 1}, got .*{code}"):
        written_by_hand(tmp_path, spec_of(vocab_size), codes)
    assert not list(tmp_path.rglob("000001*")), "files of the refused shard are left"


@pytest.mark.parametrize("vocab_size", [2**8, 2**10, 2**18])
def test_code_outside_the_vocabulary_is_refused_when_the_cache_is_finished(tmp_path: Path, vocab_size: int) -> None:
    writer = written_by_hand(tmp_path, spec_of(vocab_size), extreme_codes(vocab_size), shards=1)
    shard_with_code_outside(writer, 1, vocab_size)
    with pytest.raises(
        DamagedCache, match=rf"000001\.tar: sample \w+ \(b\.mp4\): .*{vocab_size - 1}, got .*{vocab_size}"
    ):
        writer.finish(None)
    assert not writer.finished


@pytest.mark.parametrize("vocab_size", [2**8, 2**10, 2**16 - 1, 2**18])
def test_code_outside_the_vocabulary_is_refused_when_read(tmp_path: Path, vocab_size: int) -> None:
    cache = cache_with_code_outside(tmp_path, vocab_size)
    with pytest.raises(
        DamagedCache, match=rf"000001\.tar: sample \w+ \(b\.mp4\): .*{vocab_size - 1}, got .*{vocab_size}"
    ):
        cache.codes(1)
    assert np.array_equal(cache.codes(0), extreme_codes(vocab_size)[0])


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("vocab_size", [2**8, 2**10, 2**16 - 1, 2**18])
def test_code_outside_the_vocabulary_is_refused_when_gathered(tmp_path: Path, vocab_size: int, checksums: bool) -> None:
    cache = TokenCache.open(cache_with_code_outside(tmp_path, vocab_size).address, checksums=checksums)
    with pytest.raises(DamagedCache, match=r"000001\.tar: view 1 of video 1"):
        cache.clips.gather(np.array([0, 1, 1]), np.array([0, 0, 1]))
    codes_Bthw = cache.clips.gather(np.array([0, 1]), np.array([1, 0]))
    assert np.array_equal(codes_Bthw, extreme_codes(vocab_size)[[0, 1], [1, 0]])


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 3, 3), (1, 2, 2, 3, 3), (0, 2, 3, 3)])
def test_codes_of_another_shape_are_refused_when_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    writer = CacheWriter(tmp_path, "hand", SPEC, 2)
    writer.begin()
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")), writer.open_shard(0) as shard:
        shard.add(SPEC.videos[0], np.zeros(shape, np.int64), some_cuts(2), {})
