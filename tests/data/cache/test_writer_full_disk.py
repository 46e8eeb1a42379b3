"""R25: a full or read-only disk ends the work with an error that says so, harms nothing, and hinders no later run."""

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
"""Of each video; the fourth does not fit where files are limited."""
DENSE = replace(
    SPEC,
    clip=replace(SPEC.clip, views="dense"),
    videos=tuple(Video(f"{i}.mp4", 100 + i) for i in range(len(VIEWS))),
)


CODES = [np.random.default_rng(i).integers(64, size=(views, 2, 3, 3)) for i, views in enumerate(VIEWS)]
CODEBOOK = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the cache when nothing happens."""
    return files_of(filled(tmp_path_factory.mktemp("straight"), DENSE, CODES, CODEBOOK))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Files cannot grow further, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_only_finished_files(folder: Path, straight: dict[str, bytes]) -> set[str]:
    """Nothing half is visible, and nothing is left that another run would wait for; returns what is there."""
    found = files_of(folder)
    kept = {name for name in found if name in straight and found[name] == straight[name]}
    # A tar without its record does not count as a shard yet; the plan is there while there is work.
    assert set(found) - kept <= {"plan.json"}, set(found) - kept
    assert not [name for name in os.listdir(folder / "shards") if name.endswith(".claim")]
    return kept


def test_full_disk_is_reported_as_such_and_leaves_no_file(tmp_path: Path) -> None:
    with files_of_at_most(2**20), pytest.raises(OSError, match="File too large"), ShardWriter(tmp_path, 0, ()) as shard:
        for i in range(40):
            shard.add(sample_id(str(i)), {"codes.npy": bytes(100_000)}, {})
        shard.commit(skipped=[])
    assert os.listdir(tmp_path) == []


def test_shard_that_finds_no_room_harms_no_other_and_is_made_by_the_next_run(
    tmp_path: Path, straight: dict[str, bytes]
) -> None:
    began = time.monotonic()
    with files_of_at_most(2**14), pytest.raises(OSError, match="File too large"):
        filled(tmp_path, DENSE, CODES, CODEBOOK)
    assert time.monotonic() - began < 10
    (folder,) = tmp_path.iterdir()
    kept = assert_only_finished_files(folder, straight)
    assert kept == {f"shards/00000{i}.{suffix}" for i in range(3) for suffix in ("tar", "json")}
    with pytest.raises(DamagedCache, match="is unfinished; run tokenize again"):
        TokenCache.open(folder)
    before = {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert files_of(filled(tmp_path, DENSE, CODES, CODEBOOK)) == straight
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == before, "what is there is not made again"


# --- a real disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a file system")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # a test that failed may hold files open


def fill_up(path: Path, room: int) -> None:
    """Leave so many bytes."""
    with open(path, "wb") as file:
        file.write(bytes(os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize - room))


def test_wherever_the_disk_gets_full_the_next_run_completes_the_cache(disk: Path, straight: dict[str, bytes]) -> None:
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
                    assert_only_finished_files(folder, straight)
                    assert not (folder / "manifest.json").exists()
        ballast.unlink()
        folder = filled(disk / "caches", DENSE, CODES, CODEBOOK)
        assert files_of(folder) == straight
        TokenCache.open(folder).verify()
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    assert outcomes.count("full") > 20
    assert outcomes[-1] == "finished"


def test_merge_onto_a_full_disk_is_continued(disk: Path, tmp_path: Path) -> None:
    parts = []
    for i in range(2):
        videos = tuple(Video(f"{j:02d}.mp4", 9) for j in range(i, 30, 2))
        codes = [np.full((2, 2, 3, 3), int(video.path[:2])) for video in videos]
        folder = filled(tmp_path / str(i), replace(SPEC, videos=videos), codes)
        write_json(folder / "made_with.json", {"tokenizer": "t", "videos": str(i)})
        parts.append(TokenCache.open(folder))
    straight = files_of(merge(parts, tmp_path / "straight", "merged"))
    fill_up(disk / "ballast", 100_000)
    with pytest.raises(OSError, match="No space left on device"):
        merge(parts, disk / "caches", "merged")
    (folder,) = (disk / "caches").iterdir()
    assert len(list(folder.glob("shards/*.json"))) > 3
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert files_of(merge(parts, disk / "caches", "merged")) == straight


def test_a_cache_on_a_read_only_disk_is_read_but_not_written(disk: Path, straight: dict[str, bytes]) -> None:
    folder = filled(disk / "caches", DENSE, CODES, CODEBOOK)
    other = disk / "others"
    other.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    cache = TokenCache.open(folder)
    cache.verify()
    assert cache.clips.gather(np.arange(6), np.zeros(6, int)).shape == (6, 2, 3, 3)
    with pytest.raises(OSError, match="Read-only file system"):
        filled(other, DENSE, CODES, CODEBOOK)
    assert files_of(folder) == straight
