"""The codes in a cache do not depend on how often, by how many processes or in which batches they were made."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.ahead import ahead
from data.cache import TokenCache
from data.clip_spec import ClipSpec
from data.sources import load_source
from pipelines.engine.encoding import Decoded, Encoder, decode
from tests.helpers.commands import DIGITS, TINY_MODEL, last_line, start, start_ranks
from tests.helpers.forked import ENVIRONMENT, ROOT, Forked
from tests.helpers.videos import MakeVideo
from tests.pipelines.engine.test_cpu_processes import hashes, processes
from tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(finished_project: Path, answers: dict[str, Any]) -> str:
    return str(finished_project / answers["train_tokenizer"]["run"])


def tokenized(folder: Path, *flags: str) -> tuple[dict[str, Any], TokenCache]:
    """Run tokenize in a folder, and return its summary and the cache."""
    summary = last_line(start(folder, "tokenize", *flags))
    return summary, TokenCache.open(folder / summary["cache"])


# --- reuse


def test_a_second_tokenize_decodes_and_encodes_nothing(video_folder: Path, tokenizer: str, tmp_path: Path) -> None:
    videos = Path(shutil.copytree(video_folder, tmp_path / "videos"))
    first, cache = tokenized(tmp_path, "--videos", "videos", "--tokenizer", tokenizer)
    manifest = Path(cache.address, "manifest.json").read_bytes()
    for path in videos.rglob("*.*"):  # files of the same size that cannot be decoded
        path.write_bytes(b"\0" * path.stat().st_size)
    again, _ = tokenized(
        tmp_path, "--videos", "videos", "--tokenizer", tokenizer, "--workers", "0", "--shard_size", "1"
    )
    assert (first["reused"], again["reused"]) == (False, True)
    assert again["skipped"] == 0
    assert again["key"] == first["key"]
    assert Path(cache.address, "manifest.json").read_bytes() == manifest


def test_lost_and_damaged_shards_of_a_finished_cache_are_made_again(tokenizer: str, tmp_path: Path) -> None:
    flags = ["--videos", DIGITS, "--tokenizer", tokenizer, "--shard_size", "7"]
    _, cache = tokenized(tmp_path, *flags)
    before = hashes(Path(cache.address, "shards"))
    manifest = Path(cache.address, "manifest.json").read_bytes()
    Path(cache.address, "shards", "000002.tar").unlink()
    Path(cache.address, "shards", "000004.json").unlink()
    os.truncate(Path(cache.address, "shards", "000001.tar"), 5000)
    record = Path(cache.address, "shards", "000003.json")
    record.write_text(record.read_text().replace('"clip_xxh3": "', '"clip_xxh3": "A', 1))
    answer, again = tokenized(tmp_path, *flags[:-1], "100")
    assert not answer["reused"]
    assert hashes(Path(again.address, "shards")) == before
    assert Path(again.address, "manifest.json").read_bytes() == manifest


def test_a_cache_of_resampled_and_scaled_clips_is_read_again(
    video_folder: Path, tokenizer: str, tmp_path: Path
) -> None:
    flags = ["--clip.views", "3", "--clip.fps", "5", "--clip.scales", "[1,0.75]"]
    _, cache = tokenized(tmp_path, "--videos", str(video_folder), "--tokenizer", tokenizer, *flags)
    assert (cache.clip.fps, cache.clip.scales) == (5, (1, 0.75))
    sides = {view.short_side for row in range(len(cache)) for view in cache.views(row)[1:]}
    assert sides == {64, 85}, "the short side of a crop of 64 pixels at scales 1 and 0.75"
    assert {cache.views(row)[0].short_side for row in range(len(cache))} == {64}


# --- the same codes from any batch size, number of threads and number of processes


@pytest.fixture(scope="module")
def codes_of_64(finished_project: Path, answers: dict[str, Any]) -> dict[tuple[int, int], np.ndarray]:
    """Codes of 64 clips, by batch size and number of decoding threads."""
    tokenizer = load_tokenizer(str(finished_project / answers["train_tokenizer"]["run"]))
    source = load_source("builtin:moving-digits:32:0")
    clip = ClipSpec(views=2)

    def work(video: Any) -> Iterator[Decoded]:
        return decode(source, video, clip, "none")

    codes_by_way = {}
    for batch, workers in ((1, 0), (3, 0), (8, 0), (8, 4)):
        decoded = ahead(source.videos, work, workers, depth=batch)
        videos = list(Encoder(tokenizer, batch, "fp32").videos(decoded))
        codes_by_way[batch, workers] = np.stack([codes for video in videos for codes in video.codes])
    return codes_by_way


def test_codes_do_not_depend_on_the_batch_or_on_threads(codes_of_64: dict[tuple[int, int], np.ndarray]) -> None:
    assert codes_of_64[1, 0].shape == (64, 8, 8, 8)
    assert len(np.unique(codes_of_64[1, 0])) > 8
    for way, codes in codes_of_64.items():
        assert (codes != codes_of_64[1, 0]).sum() == 0, way


def test_two_processes_and_threads_write_the_same_codes(tokenizer: str, tmp_path: Path) -> None:
    flags = ["--videos", DIGITS, "--tokenizer", tokenizer, "--shard_size", "7", "--clip.views", "2"]
    _, one = tokenized(tmp_path, *flags, "--caches", "one", "--workers", "0")
    two = last_line(start_ranks(tmp_path, "tokenize", *flags, "--caches", "two", "--workers", "4", "--out", "run"))
    assert processes(tmp_path / "run") == 2
    assert hashes(Path(one.address, "shards")) == hashes(tmp_path / two["cache"] / "shards")


def test_bf16_counts_the_codes_that_differ_from_fp32(tokenizer: str, tmp_path: Path) -> None:
    result = start(tmp_path, "tokenize", "--videos", DIGITS, "--tokenizer", tokenizer, "--precision", "bf16")
    answer = last_line(result)
    cache = TokenCache.open(tmp_path / answer["cache"])
    compared = cache.manifest["bf16"]
    assert compared["codes"] == 8 * 512, "the first batch of the only shard"
    assert compared["rate"] == answer["bf16_mismatch"] == compared["differ"] / compared["codes"]
    assert f"{compared['differ']} of {compared['codes']}" in result.stderr
    _, exact = tokenized(tmp_path, "--videos", DIGITS, "--tokenizer", tokenizer)
    assert exact.key != cache.key
    assert exact.manifest["bf16"] is None
    first_batch = range(8)
    differ = sum(int((cache.codes(i) != exact.codes(i)).sum()) for i in first_batch)
    assert differ == compared["differ"]


# --- several commands at once


def test_independent_commands_share_the_work(tokenizer: str, tmp_path: Path) -> None:
    flags = ["--videos", "builtin:moving-digits:60:0", "--tokenizer", tokenizer, "--shard_size", "3", "--workers", "1"]
    _, alone = tokenized(tmp_path, *flags, "--caches", "alone")
    command = [str(ROOT / "pipelines" / "tokenize.py"), *flags, "--caches", "shared"]
    environment = {**ENVIRONMENT, "ARVIDEO_TRACEBACK": "1"}
    runs = [Forked([*command, "--out", f"run{i}"], tmp_path, environment) for i in range(3)]
    ends = [run.wait(200) for run in runs]
    assert len({last_line(end)["key"] for end in ends}) == 1
    (shared,) = (tmp_path / "shared").iterdir()
    assert hashes(shared / "shards") == hashes(Path(alone.address, "shards")), "no claim files are left"
    assert (shared / "manifest.json").read_bytes() == Path(alone.address, "manifest.json").read_bytes()
    assert not list(shared.glob("*.tmp-*"))


# --- dense views


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory, make_video: MakeVideo) -> Path:
    """A folder with a video of 75 frames of rising brightness, and a truncated video."""
    folder = tmp_path_factory.mktemp("long")
    frames = [np.full((32, 48, 3), 20 + 2 * i, np.uint8) for i in range(75)]
    make_video(folder / "rising.mp4", frames, codec="libx264", rate=25)
    noise = np.random.default_rng(0).integers(256, size=(75, 32, 48, 3), dtype=np.uint8)
    torn = make_video(folder / "torn.avi", list(noise))
    os.truncate(torn, torn.stat().st_size // 2)
    return folder


def test_dense_views_cover_the_whole_video(long_video: Path, tokenizer: str, tmp_path: Path) -> None:
    flags = ["--videos", str(long_video), "--tokenizer", tokenizer, "--clip.views", "dense", "--clip.stride", "2"]
    answer, cache = tokenized(tmp_path, *flags, "--clip.size", "32", "--keep_pixels", "raw")
    assert answer["skipped"] == 1
    assert [entry["path"] for entry in cache.manifest["skipped"]] == ["torn.avi"]
    assert cache.timeline(0).tolist() == [[0, 32], [32, 64], [64, 75]]
    assert cache.views_N.tolist() == [3]
    assert cache.codes(0).shape[0] == answer["clips"] == 3
    facts = cache.facts(0)
    assert (facts["frames"], facts["rate"], facts["real"]) == (75, 25.0, [16, 16, 6])
    slices, frames = cache.layout.grid[0], np.array(facts["real"])
    assert cache.clips.slices(np.zeros(3, int), np.arange(3)).tolist() == (-(-frames * slices // 16)).tolist()
    brightness = np.concatenate([cache.pixels(0, view)[:, 16, 16, 0] for view in range(3)])
    assert np.abs(brightness[:38] - (20 + 4 * np.arange(38))).max() <= 3
    assert (brightness[38:] == brightness[37]).all(), "padded with the last frame"
    assert cache.canonical(0) == 1


def test_dense_codes_are_the_codes_of_the_kept_pixels(long_video: Path, tokenizer: str, tmp_path: Path) -> None:
    flags = ["--videos", str(long_video), "--tokenizer", tokenizer, "--clip.views", "dense", "--clip.size", "32"]
    _, cache = tokenized(tmp_path, *flags, "--keep_pixels", "raw", "--encode_batch", "3")
    _, other = tokenized(tmp_path, *flags, "--encode_batch", "8", "--workers", "0")
    assert np.array_equal(cache.codes(0), other.codes(0))
    clips = [cache.pixels(0, view) for view in range(5)]
    codes = load_tokenizer(tokenizer).encode(torch.from_numpy(np.stack(clips)))
    assert np.array_equal(cache.codes(0), codes.numpy())


def test_pretraining_accepts_a_dense_cache(long_video: Path, tokenizer: str, tmp_path: Path) -> None:
    flags = ["--videos", str(long_video), "--tokenizer", tokenizer, "--clip.views", "dense"]
    tokenized(tmp_path, *flags)
    assert last_line(start(tmp_path, "pretrain_ar", *TINY_MODEL))["step"] == 6
