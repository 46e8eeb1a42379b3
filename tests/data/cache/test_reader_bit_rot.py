"""A killed writer leaves no partial file, and every truncation and every flipped bit of a cache is found."""

import builtins
import hashlib
import io
import json
import os
import random
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache import CacheWriter, TokenCache
from data.pixels import pack_pixels
from data.sources import Video
from tests.helpers.cache_contents import SPEC, expected_codes, files_of, in_a_child, some_cuts
from tests.helpers.caches import MakeCache
from tests.helpers.damage_counts import count_cuts, count_flips, count_metadata_flips

# --- killed writers


KILLED = replace(SPEC, keep_pixels="raw", videos=tuple(Video(f"{i:02d}.mp4", i) for i in range(11)))


def fill(caches: Path) -> Path:
    """Complete a cache as tokenize does."""
    writer = CacheWriter(caches, "toy", KILLED, shard_size=3)
    if not writer.finished:
        writer.begin()
        for number in writer.claims():
            with writer.open_shard(number) as shard:
                for video in writer.videos(number):
                    codes_Vthw = expected_codes(video.path)
                    pixels = np.resize(codes_Vthw, (4, 8, 8, 3)).astype(np.uint8)
                    members = {k: m for view in range(2) for k, m in pack_pixels("raw", view, pixels).items()}
                    shard.add(video, codes_Vthw, some_cuts(2), members)
                shard.commit()
        writer.finish(np.arange(128, dtype=np.float32).reshape(64, 2))
    writer.note({"tokenizer": "of the test", "videos": "none"})
    return writer.folder


class Kill:
    """Kills this process before file operation number `operation`, or after `byte` bytes have been written."""

    def __init__(self, operation: int | None = None, byte: int | None = None) -> None:
        self.operations, self.bytes = 0, 0
        self._operation, self._byte = operation, byte

    def during(self, work: Callable[[], object]) -> None:
        """Run `work` in this process, which must be a forked one, counting its file operations and bytes."""
        builtin_open = builtins.open

        class KillingFile(io.FileIO):
            def write(file, content: Any) -> int:  # noqa: N805
                if self._byte is not None and self.bytes + len(content) > self._byte:
                    io.FileIO.write(file, content[: self._byte - self.bytes])
                    os.kill(os.getpid(), signal.SIGKILL)
                self.bytes += len(content)
                return io.FileIO.write(file, content)

        def killing_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return KillingFile(path, mode) if mode == "wb" else builtin_open(path, mode, *args, **kwargs)

        builtins.open = killing_open  # type: ignore[assignment]
        sys.addaudithook(self._count_operation)
        work()

    def _count_operation(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" or (event.startswith("os.") and event != "os.kill"):
            if self.operations == self._operation:
                os.kill(os.getpid(), signal.SIGKILL)
            self.operations += 1


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an uninterrupted run."""
    return fill(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def extent(tmp_path_factory: pytest.TempPathFactory) -> Kill:
    """Number of file operations and bytes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("extent")
    kill = Kill()

    def count() -> None:
        kill.during(lambda: fill(folder / "caches"))
        (folder / "extent").write_text(f"{kill.operations} {kill.bytes}")

    assert in_a_child(count).wait() == 0
    kill.operations, kill.bytes = map(int, (folder / "extent").read_text().split())
    return kill


def assert_no_partial_file(folder: Path) -> None:
    """Check that every file under a final name matches its record or the manifest."""
    for tar in folder.glob("shards/*.tar"):
        assert tar.with_suffix(".json").exists(), f"{tar.name} has no record"
        record = json.loads(tar.with_suffix(".json").read_text())
        assert (record["bytes"], record["sha256"]) == (tar.stat().st_size, sha256(tar))
    if (folder / "manifest.json").exists():
        entries = json.loads((folder / "manifest.json").read_text())["shards"]
        assert [entry["file"] for entry in entries] == [f"{n:06d}.tar" for n in range(4)]
        for entry in entries:
            tar = folder / "shards" / entry["file"]
            assert (entry["bytes"], entry["sha256"]) == (tar.stat().st_size, sha256(tar))
            assert entry["record"] == sha256(tar.with_suffix(".json"))
            with tarfile.open(tar) as archive:
                assert entry["samples"] == len({name.partition(".")[0] for name in archive.getnames()})
        TokenCache.open(folder).verify()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("trial", [*range(20), *(pytest.param(i, marks=pytest.mark.soak) for i in range(20, 200))])
def test_killed_writer_leaves_no_partial_file_and_the_next_completes_the_cache(
    reference: Path, extent: Kill, tmp_path: Path, trial: int
) -> None:
    draw = random.Random(trial)
    # The second and third writer may be killed too.
    for _ in range(draw.choice([1, 1, 2, 3])):
        if draw.random() < 0.5:
            kill = Kill(operation=draw.randrange(extent.operations))
        else:
            kill = Kill(byte=draw.randrange(extent.bytes))
        assert in_a_child(lambda kill=kill: kill.during(lambda: fill(tmp_path))).wait() in (0, -signal.SIGKILL)  # type: ignore[misc]
        for folder in tmp_path.iterdir():
            assert_no_partial_file(folder)
    completed = fill(tmp_path)
    assert completed.name == reference.name
    assert files_of(completed) == files_of(reference)


# --- truncations and flipped bits


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    """The second of three shards, with raw pixels."""
    return make_cache(tmp_path_factory.mktemp("caches"), keep_pixels="raw") / "shards" / "000001.tar"


def test_every_truncation_of_a_shard_is_found_when_the_cache_is_opened(shard: Path) -> None:
    counts = count_cuts(shard)
    assert counts["refused"] == counts["cuts"] == shard.stat().st_size // 64


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_every_flipped_bit_of_a_shard_is_found_and_its_sample_named(shard: Path, flips: int) -> None:
    counts = count_flips(shard, flips)
    assert counts["verified"] == counts["flips"] == flips
    assert counts["named"] == counts["in_samples"] > 0
    assert counts["reported"] == counts["outside"] > 0


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_every_flipped_bit_of_codes_is_found_when_they_are_read(
    tmp_path: Path, make_cache: MakeCache, flips: int
) -> None:
    # The codes are most of the shard.
    shard = make_cache(tmp_path, codes_shape=(8, 16, 16)) / "shards" / "000001.tar"
    counts = count_flips(shard, flips)
    assert counts["codes"] == counts["gather"] == counts["in_codes"] > flips / 2


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_every_flipped_bit_of_manifest_and_records_is_found_on_opening(shard: Path, flips: int) -> None:
    counts = count_metadata_flips(shard.parent.parent, flips)
    assert counts["refused"] == counts["flips"] == flips
