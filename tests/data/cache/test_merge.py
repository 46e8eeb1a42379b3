"""Merging gives, byte for byte, the cache of all videos tokenized together, or an error with the reason."""

import json
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from data.cache import CacheWriter, DamagedCache, TokenCache, storage
from data.cache.merge import merge
from data.files import write_json
from data.sources import Video
from tests.helpers.cache_contents import (
    SPEC,
    all_codes,
    damage_clip,
    expected_codes,
    files_of,
    in_a_child,
    some_cuts,
    written_by_hand,
)
from tests.helpers.caches import MakeCache

VIDEOS = [Video(f"{i:03d}.mp4", 100 + i, label=str(i % 2)) for i in range(20)]
SPLITS = {
    "disjoint": [range(10), range(10, 20)],
    "in another order": [range(12, 20), range(12)],
    "interleaved": [range(0, 20, 2), range(1, 20, 2)],
    "overlapping": [range(13), range(7, 20)],
    "one within another": [range(20), range(3, 8)],
    "equal": [range(20), range(20)],
    "of three": [range(0, 20, 3), range(1, 20, 3), range(2, 20, 3)],
}
DAMAGED = ["004.mp4", "005.mp4", "006.mp4", "013.mp4"]


class Parts:
    """Makes caches of some of the videos, with the files that tokenize writes."""

    def __init__(self, folder: Path, make_cache: MakeCache) -> None:
        self._folder, self._make = folder, make_cache

    def of(self, rows: Sequence[int], name: str, **settings: Any) -> TokenCache:
        videos = [VIDEOS[row] for row in rows]
        folder = self._make(self._folder / name, videos, name=name, **{"keep_pixels": "raw", **settings})
        write_json(folder / "made_with.json", {"tokenizer": "t", "videos": name})
        return TokenCache.open(folder)

    def split(self, kind: str, **settings: Any) -> list[TokenCache]:
        return [self.of(rows, f"part{i}", **settings) for i, rows in enumerate(SPLITS[kind])]

    def together(self, **settings: Any) -> dict[str, bytes]:
        """Files of the cache of all videos, without made_with.json."""
        return content_of(Path(self.of(range(20), "together", **settings).address))


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name != "made_with.json"}


@pytest.fixture
def parts(tmp_path: Path, make_cache: MakeCache) -> Parts:
    return Parts(tmp_path / "parts", make_cache)


@pytest.mark.parametrize("kind", SPLITS)
def test_merged_cache_equals_the_cache_of_all_videos_byte_for_byte(parts: Parts, tmp_path: Path, kind: str) -> None:
    merged = merge(parts.split(kind), tmp_path / "caches", "merged")
    assert content_of(merged) == parts.together()
    assert sorted(os.listdir(tmp_path / "caches")) == [merged.name]


@pytest.mark.parametrize("kind", SPLITS)
def test_skipped_videos_keep_their_reason(parts: Parts, tmp_path: Path, kind: str) -> None:
    merged = merge(parts.split(kind, skip=DAMAGED), tmp_path / "caches", "merged")
    assert content_of(merged) == parts.together(skip=DAMAGED)
    skipped = TokenCache.open(merged).manifest["skipped"]
    assert skipped == [{"path": path, "reason": "damaged for the test"} for path in DAMAGED]


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_pixels": "none"},
        {"keep_pixels": "jpeg"},
        {"views": "dense"},
        {"views": 1, "vocab_size": 2**18},
        {"levels": ((8, 8),)},
        {"codebook_VC": np.arange(128, dtype=np.float32).reshape(64, 2)},
        {"shard_size": 7},
        {"shard_size": 100},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_caches_of_every_kind_can_be_merged(parts: Parts, tmp_path: Path, settings: dict[str, Any]) -> None:
    merged = merge(parts.split("interleaved", **settings), tmp_path / "caches", "merged")
    assert content_of(merged) == parts.together(**settings)


def test_shard_size_is_that_of_the_first_part(parts: Parts, tmp_path: Path) -> None:
    halves = [parts.of(range(10), "small", shard_size=3), parts.of(range(10, 20), "large", shard_size=9)]
    assert content_of(merge(halves, tmp_path / "caches", "merged")) == parts.together(shard_size=3)


def test_merged_cache_passes_verify_and_names_all_sources(parts: Parts, tmp_path: Path) -> None:
    progress: list[int] = []
    cache = TokenCache.open(merge(parts.split("interleaved"), tmp_path / "caches", "merged", progress.append))
    cache.verify()
    assert cache.videos == VIDEOS
    assert np.array_equal(all_codes(cache), [expected_codes(video.path) for video in VIDEOS])
    assert cache.made_with == {"tokenizer": "t", "videos": "part0 + part1"}
    assert progress == [4] * 5
    assert not list(tmp_path.rglob("*.claim"))


def test_parts_are_not_changed(parts: Parts, tmp_path: Path) -> None:
    split = parts.split("overlapping")
    before = [files_of(Path(part.address)) for part in split]
    merge(split, tmp_path / "caches", "merged")
    assert [files_of(Path(part.address)) for part in split] == before


def test_merging_again_writes_nothing(parts: Parts, tmp_path: Path) -> None:
    merged = merge(parts.split("disjoint"), tmp_path / "caches", "merged")
    before = {path: path.stat().st_mtime_ns for path in (merged / "shards").iterdir()}
    progress: list[int] = []
    assert merge(parts.split("in another order"), tmp_path / "caches", "other name", progress.append) == merged
    assert {path: path.stat().st_mtime_ns for path in (merged / "shards").iterdir()} == before
    assert progress == []


def test_merged_caches_can_be_merged(parts: Parts, tmp_path: Path) -> None:
    one, two, three = parts.split("of three")
    both = TokenCache.open(merge([three, one], tmp_path / "both", "both"))
    assert content_of(merge([two, both], tmp_path / "caches", "merged")) == parts.together()


def test_parts_without_made_with_json_can_be_merged(parts: Parts, tmp_path: Path) -> None:
    split = parts.split("disjoint")
    Path(split[0].address, "made_with.json").unlink()
    assert content_of(merge(split, tmp_path / "caches", "merged")) == parts.together()


# --- interrupted


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_killed_merge_is_resumed(parts: Parts, tmp_path: Path, shards: int) -> None:
    split = parts.split("interleaved")
    progress: list[int] = []

    def done(videos: int) -> None:
        progress.append(videos)
        if len(progress) == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    child = in_a_child(lambda: merge(split, tmp_path / "caches", "merged", done))
    assert child.wait() == -signal.SIGKILL
    (folder,) = (tmp_path / "caches").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shards/*.tar")}
    assert len(before) == shards
    with pytest.raises(DamagedCache, match="unfinished"):
        TokenCache.open(folder)
    merged = merge(split, tmp_path / "caches", "merged", progress.append)
    assert progress == [4] * (5 - shards)
    assert content_of(merged) == parts.together()
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("shards/*.tar")}.items()


def test_a_merge_killed_within_a_shard_is_resumed(parts: Parts, tmp_path: Path) -> None:
    split = parts.split("interleaved")

    class KilledOnRead(TokenCache):
        def codes(self, index: int) -> np.ndarray:
            # Video 3 of this part is the seventh of the merged cache, in its second shard.
            if index == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().codes(index)

    killing = KilledOnRead.open(split[0].address)
    assert in_a_child(lambda: merge([killing, split[1]], tmp_path / "caches", "merged")).wait() == -signal.SIGKILL
    (shards,) = tmp_path.glob("caches/*/shards")
    files = {name.partition(".tmp-")[0] for name in os.listdir(shards)}
    assert files == {"000000.json", "000000.tar", "000001.tar", "000001.claim"}
    assert content_of(merge(split, tmp_path / "caches", "merged")) == parts.together()


def test_processes_that_merge_the_same_caches_share_the_work(parts: Parts, tmp_path: Path) -> None:
    split = parts.split("interleaved", shard_size=1)

    def done(_: int) -> None:
        with open(tmp_path / "log", "a") as log:
            log.write("made\n")

    children = [in_a_child(lambda: merge(split, tmp_path / "caches", "merged", done)) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    (merged,) = (tmp_path / "caches").iterdir()
    assert content_of(merged) == parts.together(shard_size=1)
    assert len((tmp_path / "log").read_text().splitlines()) == 20, "a shard was written twice"


# --- refused


def test_merging_one_cache_is_an_error(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 caches, got 1"):
        merge([parts.of(range(10), "one")], tmp_path / "caches", "merged")


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"tokenizer": "another one"}, "tokenizer is a tokenizer and another one"),
        ({"vocab_size": 128}, "vocab_size is 64 and 128"),
        ({"codes_shape": (2, 3, 4)}, "codes_shape"),
        ({"views": 3}, "clip is"),
        ({"levels": ((8, 8),)}, "levels"),
        ({"keep_pixels": "none"}, "keep_pixels is raw and none"),
        ({"codebook_VC": np.ones((64, 2), np.float32)}, "codebook"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_caches_of_different_specifications_are_refused_with_the_difference(
    parts: Parts, tmp_path: Path, settings: dict[str, Any], difference: str
) -> None:
    one, other = parts.of(range(10), "one"), parts.of(range(10, 20), "other", **settings)
    with pytest.raises(ValueError, match=f"one-.* and .*other-.*: .*{difference}"):
        merge([one, other], tmp_path / "caches", "merged")
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize("change", [{"size": 7}, {"label": "x"}, {"group": "g"}, {"split": "test"}])
def test_different_videos_of_the_same_path_are_refused(
    parts: Parts, tmp_path: Path, make_cache: MakeCache, change: dict[str, Any]
) -> None:
    changed = [replace(VIDEOS[9], **change), *VIDEOS[10:]]
    other = TokenCache.open(make_cache(tmp_path / "other", changed, keep_pixels="raw"))
    with pytest.raises(ValueError, match=r"other/toy-.*009\.mp4"):
        merge([parts.of(range(10), "one"), other], tmp_path / "caches", "merged")
    assert not (tmp_path / "caches").exists()


def test_damage_of_a_part_ends_the_merge_without_a_manifest(parts: Parts, tmp_path: Path) -> None:
    split = parts.split("disjoint")
    damage_clip(split[1].address, 5)
    with pytest.raises(DamagedCache, match=r"000001\.tar: sample \w+ \(015\.mp4\), codes\.npy"):
        merge(split, tmp_path / "caches", "merged")
    assert not list(tmp_path.glob("caches/*/manifest.json"))
    assert not list(tmp_path.glob("caches/*/shards/*.tmp-*"))
    assert not list(tmp_path.glob("caches/*/shards/*.claim")), "other processes would wait for this claim"


def test_counts_of_codes_compared_in_bf16_are_added(tmp_path: Path) -> None:
    """tokenize compares one batch of each shard, so the counts of a merged cache are those of its parts."""
    caches = []
    for i, count in enumerate((100, 50)):
        videos = (Video(f"{i}.mp4", 5),)
        writer: CacheWriter = written_by_hand(tmp_path / str(i), replace(SPEC, precision="bf16", videos=videos), [], 0)
        with writer.open_shard(0) as shard:
            shard.add(videos[0], np.zeros((2, 2, 3, 3), int), some_cuts(2), {})
            shard.compare(count, 3)
            shard.commit()
        writer.finish(None)
        writer.note({"tokenizer": "t", "videos": str(i)})
        caches.append(TokenCache.open(writer.folder))
    manifest = json.loads((merge(caches, tmp_path / "caches", "merged") / "manifest.json").read_text())
    assert manifest["bf16"] == {"codes": 150, "differ": 6, "rate": 0.04}


def test_caches_of_more_shards_than_open_files_are_merged_and_read(
    tmp_path: Path, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All caches of a process share the limit of open files, and a batch over many shards keeps within it."""
    halves = [[Video(f"{i:03d}.mp4", i) for i in range(first, 40, 2)] for first in (0, 1)]
    folders = [make_cache(tmp_path / "parts", half, name=f"part{i}", shard_size=1) for i, half in enumerate(halves)]

    def merge_with_few_files() -> None:
        free, (_, hard) = 16, resource.getrlimit(resource.RLIMIT_NOFILE)
        monkeypatch.setattr(storage, "_MAX_OPEN_FILES", free // 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + free, hard))
        merged = TokenCache.open(merge([TokenCache.open(folder) for folder in folders], tmp_path, "merged"))
        codes_Bthw = merged.clips.gather(np.arange(40), np.zeros(40, int))
        assert all(np.array_equal(a[0], b) for a, b in zip(all_codes(merged), codes_Bthw, strict=True))

    assert in_a_child(merge_with_few_files).wait() == 0
