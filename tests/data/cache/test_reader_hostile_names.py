"""Fifty hostile file names pass unchanged from a folder or list through the shards of a cache."""

import csv
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.cache import TokenCache
from data.clip_spec import ClipSpec
from data.clips import read_clips
from data.sources import Source, Video, load_source
from tests.helpers.cache_contents import expected_codes
from tests.helpers.caches import MakeCache
from tests.helpers.hostile_names import HOSTILE_NAMES
from tests.helpers.videos import MakeVideo

NAMES = [os.fsdecode(name) for name in HOSTILE_NAMES.values()]
ONE_LINE = [name for name in NAMES if not set(name) & set("\n\r")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file for each name, all of different sizes, in a sub-folder whose name is hostile too."""
    subfolder = tmp_path / "set" / "a, 'b' #\udcff"
    try:
        subfolder.mkdir(parents=True)
        for i, name in enumerate(NAMES):
            (subfolder / name).write_bytes(b"x" * (i + 1))
    except OSError:
        pytest.skip("this file system does not allow arbitrary bytes in names")
    if len(os.listdir(subfolder)) < len(NAMES):
        pytest.skip("this file system treats different names as equal")
    return tmp_path / "set"


def from_folder(folder: Path) -> Source:
    return load_source(str(folder))


def from_csv(folder: Path) -> Source:
    """Labels and groups are hostile names too."""
    with open(folder / "list.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [[f"a, 'b' #\udcff/{name}", name, name[::-1].strip() or "x", "train"] for name in NAMES]
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["path", "label", "group", "split"], *rows])
    return load_source(str(folder / "list.csv"))


def from_list(folder: Path) -> Source:
    with open(folder / "list.txt", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for name in ONE_LINE:
            path = shlex.quote(f"a, 'b' #\udcff/{name}")
            file.write(f"{path} {shlex.quote(name)}\n")
    return load_source(str(folder / "list.txt"))


def test_there_are_fifty_names() -> None:
    assert len(set(NAMES)) == len(NAMES) == 50
    assert max(len(name) for name in HOSTILE_NAMES.values()) == 255
    assert len(ONE_LINE) == 46


@pytest.mark.parametrize(("source_of", "count"), [(from_folder, 50), (from_csv, 50), (from_list, 46)])
def test_all_names_are_returned_by_a_cache(
    folder: Path, tmp_path: Path, make_cache: MakeCache, source_of: Callable[[Path], Source], count: int
) -> None:
    source = source_of(folder)
    names = NAMES if count == 50 else ONE_LINE
    assert sorted(Path(video.path).name for video in source.videos) == sorted(names)
    assert {video.size for video in source.videos} == {NAMES.index(name) + 1 for name in names}
    cache = TokenCache.open(make_cache(tmp_path / "caches", source.videos, shard_size=7))
    assert tuple(cache.videos) == source.videos
    for i, video in enumerate(source.videos):
        assert cache.facts(i)["path"] == video.path
        assert cache.facts(i)["label"] == video.label
        assert np.array_equal(cache.codes(i), expected_codes(video.path))
    cache.verify()


def test_labels_and_groups_are_returned(folder: Path, tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path / "caches", from_csv(folder).videos))
    for video in cache.videos:
        name = Path(video.path).name
        assert video == Video(video.path, video.size, name, name[::-1].strip() or "x", "train")


def test_skipped_videos_are_reported_by_name(folder: Path, tmp_path: Path, make_cache: MakeCache) -> None:
    videos = from_folder(folder).videos
    damaged = [video.path for video in videos[::2]]
    cache = TokenCache.open(make_cache(tmp_path / "caches", videos, skip=damaged, shard_size=7))
    assert [entry["path"] for entry in cache.manifest["skipped"]] == damaged
    assert [video.path for video in cache.videos] == [video.path for video in videos[1::2]]


def test_no_name_is_used_in_the_file_system_or_a_tar(folder: Path, tmp_path: Path, make_cache: MakeCache) -> None:
    cache = make_cache(tmp_path / "caches", from_folder(folder).videos, name='a, "b".c\n\udcff', shard_size=7)
    assert sorted(os.listdir(cache)) == ["manifest.json", "plan.json", "shards"]
    keys = set()
    for path in (cache / "shards").iterdir():
        assert re.fullmatch(r"00000\d\.(tar|json)", path.name)
        if path.suffix == ".tar":
            with tarfile.open(path) as archive:
                members = archive.getnames()
            assert all(re.fullmatch(r"[0-9a-f]{16}\.(json|codes\.npy)", name) for name in members)
            keys |= {name.partition(".")[0] for name in members}
    assert len(keys) == 50, "two samples have the same key"
    for path in cache.rglob("*.json"):
        assert path.read_bytes().isascii()
        json.loads(path.read_text())


def test_key_depends_on_every_byte_of_a_name(folder: Path, tmp_path: Path, make_cache: MakeCache) -> None:
    videos = from_folder(folder).videos
    folders = {make_cache(tmp_path / "caches", [Video(video.path, 1)], finish=False) for video in videos}
    assert len(folders) == 50


def test_video_of_any_name_is_decoded(folder: Path, make_video: MakeVideo, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    video = make_video(tmp_path / "plain" / "a.mp4", [np.full((16, 16, 3), 40 * i, np.uint8) for i in range(4)])
    for name in NAMES:
        shutil.copy(video, folder / "a, 'b' #\udcff" / name)
    source = from_folder(folder)
    spec = ClipSpec(frames=4, size=16)
    plain = load_source(str(video.parent))
    expected = read_clips(plain, plain.videos[0], spec).pixels_VTHWC
    assert len(source.videos) == 50
    for listed in source.videos:
        assert np.array_equal(read_clips(source, listed, spec).pixels_VTHWC, expected)
