"""A full or read-only disk ends the work with a clear error, damages no file, and does not hinder later runs."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.cache import DamagedCache, TokenCache
from data.cache.merge import merge
from data.files import write_json
from data.shards import ShardWriter, sample_id
from data.sources import Video
from tests.helpers.cache_contents import SPEC, files_of, filled

VIEWS = [3, 2, 5, 1000, 4, 1]
"""Views of each video; the shard of the fourth exceeds the limit of `file_size_limit` below."""
DENSE = replace(
    SPEC,
    clip=replace(SPEC.clip, views="dense"),
    videos=tuple(Video(f"{i}.mp4", 100 + i) for i in range(len(VIEWS))),
)


CODES = [np.random.default_rng(i).integers(64, size=(views, 2, 3, 3)) for i, views in enumerate(VIEWS)]
CODEBOOK = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the cache of an uninterrupted run."""
    return files_of(filled(tmp_path_factory.mktemp("reference"), DENSE, CODES, CODEBOOK))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make writes beyond this file size fail, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_only_finished_files(folder: Path, reference: dict[str, bytes]) -> set[str]:
    """Check that all files but the plan are final and no claim is left; return the names of the final files."""
    files = files_of(folder)
    final = {name for name in files if name in reference and files[name] == reference[name]}
    assert set(files) - final <= {"plan.json"}, set(files) - final
    assert not [name for name in os.listdir(folder / "shards") if name.endswith(".claim")]
    return final


def test_full_disk_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    with file_size_limit(2**20), pytest.raises(OSError, match="File too large"), ShardWriter(tmp_path, 0, ()) as shard:
        for i in range(40):
            shard.add(sample_id(str(i)), {"codes.npy": bytes(100_000)}, {})
        shard.commit(skipped=[])
    assert os.listdir(tmp_path) == []


def test_shard_that_does_not_fit_leaves_others_intact_and_is_written_by_the_next_run(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    start = time.monotonic()
    with file_size_limit(2**14), pytest.raises(OSError, match="File too large"):
        filled(tmp_path, DENSE, CODES, CODEBOOK)
    assert time.monotonic() - start < 10
    (folder,) = tmp_path.iterdir()
    final = assert_only_finished_files(folder, reference)
    assert final == {f"shards/00000{i}.{suffix}" for i in range(3) for suffix in ("tar", "json")}
    with pytest.raises(DamagedCache, match="unfinished.*tokenize"):
        TokenCache.open(folder)
    before = {name: (folder / name).stat().st_mtime_ns for name in final}
    assert files_of(filled(tmp_path, DENSE, CODES, CODEBOOK)) == reference
    assert {name: (folder / name).stat().st_mtime_ns for name in final} == before, "a finished shard was written again"


# --- a small file system


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB. The test is skipped if mounting is not allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed")
    yield path
    # --lazy, because a failed test may have left files open.
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_up(path: Path, room: int) -> None:
    """Fill a file system except for `room` bytes."""
    with open(path, "wb") as file:
        file.write(bytes(os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize - room))


def test_next_run_completes_the_cache_at_whatever_point_the_disk_was_full(
    disk: Path, reference: dict[str, bytes]
) -> None:
    outcomes = []
    for room in range(0, 200_000, 4096):
        ballast = disk / "ballast"
        fill_up(ballast, room)
        try:
            folder = filled(disk / "caches", DENSE, CODES, CODEBOOK)
            outcomes.append("finished")
        except OSError as error:
            assert "No space left on device" in str(error)
            outcomes.append("full")
            for folder in (disk / "caches").glob("*"):
                if (folder / "shards").exists():
                    assert_only_finished_files(folder, reference)
                    assert not (folder / "manifest.json").exists()
        ballast.unlink()
        folder = filled(disk / "caches", DENSE, CODES, CODEBOOK)
        assert files_of(folder) == reference
        TokenCache.open(folder).verify()
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    assert outcomes.count("full") > 20
    assert outcomes[-1] == "finished"


def test_merge_on_a_full_disk_is_resumed(disk: Path, tmp_path: Path) -> None:
    parts = []
    for i in range(2):
        videos = tuple(Video(f"{j:02d}.mp4", 9) for j in range(i, 30, 2))
        codes = [np.full((2, 2, 3, 3), int(video.path[:2])) for video in videos]
        folder = filled(tmp_path / str(i), replace(SPEC, videos=videos), codes)
        write_json(folder / "made_with.json", {"tokenizer": "t", "videos": str(i)})
        parts.append(TokenCache.open(folder))
    reference = files_of(merge(parts, tmp_path / "reference", "merged"))
    fill_up(disk / "ballast", 100_000)
    with pytest.raises(OSError, match="No space left on device"):
        merge(parts, disk / "caches", "merged")
    (folder,) = (disk / "caches").iterdir()
    assert len(list(folder.glob("shards/*.json"))) > 3
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert files_of(merge(parts, disk / "caches", "merged")) == reference


def test_cache_on_a_read_only_disk_can_be_read(disk: Path, reference: dict[str, bytes]) -> None:
    folder = filled(disk / "caches", DENSE, CODES, CODEBOOK)
    other = disk / "others"
    other.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    cache = TokenCache.open(folder)
    cache.verify()
    assert cache.clips.gather(np.arange(6), np.zeros(6, int)).shape == (6, 2, 3, 3)
    with pytest.raises(OSError, match="Read-only file system"):
        filled(other, DENSE, CODES, CODEBOOK)
    assert files_of(folder) == reference
