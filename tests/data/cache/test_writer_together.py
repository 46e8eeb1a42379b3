"""Several independent writers of one cache, and machines that fail."""

import errno
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from data.cache import CacheWriter, TokenCache
from data.cache.merge import merge
from data.clip_spec import ClipSpec
from data.clips import read_clips
from data.decoding import DamagedVideo
from data.sources import Video, load_source
from tests.helpers.cache_contents import SPEC, files_of
from tests.helpers.caches import MakeCache

CLIP = ClipSpec(frames=4, size=16)


def writer_of(folder: Path, cache: TokenCache) -> CacheWriter:
    """Another writer for a cache that `make_cache` has made."""
    spec = replace(SPEC, tokenizer="a tokenizer", codes=replace(SPEC.codes, levels=None), videos=tuple(cache.videos))
    return CacheWriter(folder, "toy", spec, 4)


def test_late_writer_changes_nothing(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path))
    before = files_of(Path(cache.address))
    late = writer_of(tmp_path, cache)
    assert late.key == cache.key
    with late.open_shard(0) as shard:
        for video in late.videos(0):
            shard.skip(video, "the disk was missing")
        shard.commit()
    assert files_of(Path(cache.address)) == before
    assert len(TokenCache.open(cache.address)) == 10


def test_writers_that_finish_together_write_one_valid_manifest(tmp_path: Path, make_cache: MakeCache) -> None:
    complete = TokenCache.open(make_cache(tmp_path / "complete"))
    folder = make_cache(tmp_path / "parts", finish=False)
    writers = [writer_of(tmp_path / "parts", complete) for _ in range(4)]
    threads = [threading.Thread(target=writer.finish, args=(None,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files_of(folder) == files_of(Path(complete.address))


def test_finishing_again_does_not_touch_the_manifest(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path))
    manifest = Path(cache.address, "manifest.json")
    time = manifest.stat().st_mtime_ns
    writer_of(tmp_path, cache).finish(None)
    assert manifest.stat().st_mtime_ns == time


def test_finished_folder_of_two_with_the_same_key_is_used(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path, name="z"))
    (tmp_path / f"a-{cache.key[:12]}" / "shards").mkdir(parents=True)
    assert writer_of(tmp_path, cache).folder == Path(cache.address)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_failing_machine_is_not_reported_as_a_damaged_video(
    video_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise av.error.FFmpegError(number, "the machine fails")

    source = load_source(str(video_folder))
    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(OSError, match="the machine fails"):
        read_clips(source, source.videos[0], CLIP)


def test_input_output_error_of_a_readable_file_is_damage(video_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise av.error.FFmpegError(errno.EIO, "the demuxer gives up")

    source = load_source(str(video_folder))
    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(DamagedVideo, match="the demuxer gives up"):
        read_clips(source, source.videos[0], CLIP)


def test_video_that_changed_since_listing_is_an_error_not_damage(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    source = load_source(str(tmp_path))
    (tmp_path / "a.mp4").write_bytes(b"another one")
    with pytest.raises(ValueError, match="a.mp4.*changed"):
        read_clips(source, source.videos[0], CLIP)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="a.mp4"):
        read_clips(source, source.videos[0], CLIP)


def test_merging_a_cache_with_its_own_part_changes_nothing(tmp_path: Path, make_cache: MakeCache) -> None:
    complete = TokenCache.open(make_cache(tmp_path, [Video(f"{i}.mp4", i) for i in range(9)]))
    part = TokenCache.open(make_cache(tmp_path / "elsewhere", complete.videos[:4]))
    before = files_of(Path(complete.address))
    assert merge([complete, part], tmp_path, "merged") == Path(complete.address)
    assert files_of(Path(complete.address)) == before


def test_videos_with_equal_path_and_size_but_different_codes_are_not_merged(
    tmp_path: Path, make_cache: MakeCache
) -> None:
    one = TokenCache.open(make_cache(tmp_path / "one", 5))
    other = writer_of(tmp_path / "other", TokenCache.open(make_cache(tmp_path / "list", 7)))
    other.begin()
    for number in other.missing():
        with other.open_shard(number) as shard:
            for video in other.videos(number):
                codes = np.zeros((2, 2, 3, 3), np.uint16)
                shard.add_members(video, codes, {"json": b"{}"}, 8, False)
            shard.commit()
    other.finish(None)
    with pytest.raises(ValueError, match=r"0/000\.mp4"):
        merge([one, TokenCache.open(other.folder)], tmp_path, "merged")
