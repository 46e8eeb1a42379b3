"""New videos of a folder are encoded alone, and the cache is the same, byte for byte, as one that is made from nothing."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.cache import TokenCache
from pipelines.engine import encoding
from tests.helpers.cache_contents import damage_clip
from tests.helpers.commands import Call
from tests.helpers.videos import MakeVideo, moving_square
from tests.pipelines.engine.test_cpu_processes import hashes

CLIP = ["--clip.frames", "4", "--clip.size", "32", "--workers", "0"]


@pytest.fixture
def tokenize(
    call: Call, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[TokenCache, list[str]]]:
    """Function (flags) -> cache of the folder `videos`, and the videos that were decoded. A tokenizer is fitted once."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(video_folder, tmp_path / "videos")
    tokenizer = call("fit_tokenizer", "--videos", "videos", "--name", "linear-2x8x8-2x15", *CLIP[:4])["run"]
    decoded: list[str] = []
    iter_clips = encoding.iter_clips
    monkeypatch.setattr(
        encoding,
        "iter_clips",
        lambda source, video, clip: (decoded.append(video.path), iter_clips(source, video, clip))[1],
    )

    def run(*flags: str) -> tuple[TokenCache, list[str]]:
        decoded.clear()
        defaults = [] if "--videos" in flags else ["--videos", "videos"]
        summary = call("tokenize", *defaults, "--tokenizer", tokenizer, *CLIP, *flags)
        return TokenCache.open(summary["cache"]), sorted(decoded)

    return run


@pytest.mark.parametrize("flags", [["--clip.views", "2", "--keep_pixels", "jpeg"], ["--clip.views", "dense"]])
def test_only_new_videos_are_encoded(
    tokenize: Callable[..., Any], call: Call, make_video: MakeVideo, flags: list[str]
) -> None:
    tokenize(*flags)
    make_video(Path("videos/left/new.mp4"), moving_square(-1, 7))
    Path("videos/up").mkdir()
    shutil.copy("videos/right/clip 1.mkv", "videos/up")
    cache, decoded = tokenize(*flags)
    assert decoded == ["left/new.mp4", "up/clip 1.mkv"] and len(cache) == 8
    assert "6 of 8 videos are taken from earlier caches" in call.err
    whole, all_decoded = tokenize(*flags, "--caches", "others")
    assert len(all_decoded) == 8 and whole.key == cache.key
    assert hashes(Path(cache.address, "shards")) == hashes(Path(whole.address, "shards"))
    assert Path(cache.address, "manifest.json").read_bytes() == Path(whole.address, "manifest.json").read_bytes()


def test_other_settings_folders_and_damaged_codes_are_encoded_again(
    tokenize: Callable[..., Any], make_video: MakeVideo
) -> None:
    first, _ = tokenize()
    make_video(Path("videos/left/new.mp4"), moving_square(-1, 7))
    assert len(tokenize("--clip.stride", "2")[1]) == 7
    assert len(tokenize("--precision", "bf16")[1]) == 7
    shutil.copytree("videos", "copies")
    (Path("copies/left/new.mp4")).unlink()
    make_video(Path("copies/left/other.mp4"), moving_square(-1, 9))
    assert len(tokenize("--videos", "copies")[1]) == 7
    # A list that now names files of another folder; and a file that was overwritten by one of the same size.
    (Path("list.csv")).write_text("path,label\nvideos/left/clip 0.mp4,a\nvideos/right/clip 0.mp4,b\n")
    assert len(tokenize("--videos", "list.csv")[1]) == 2
    (Path("list.csv")).write_text(
        "path,label\ncopies/left/clip 0.mp4,a\ncopies/right/clip 0.mp4,b\ncopies/left/other.mp4,a\n"
    )
    assert len(tokenize("--videos", "list.csv")[1]) == 3
    changed = Path("videos/right/clip 0.mp4")
    changed.write_bytes(changed.read_bytes())
    later = time.time() + 5
    os.utime(changed, (later, later))
    damage_clip(Path(first.address), 2)
    assert tokenize()[1] == sorted(["left/new.mp4", first.videos[2].path, "right/clip 0.mp4"])
