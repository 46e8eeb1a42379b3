"""Fixtures that packages share: tiny videos and caches, made here, the same in every run."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

MakeVideo = Callable[..., Path]
MakeCache = Callable[..., Path]


def _make_video(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "mpeg4",
    rate: int = 10,
    times: Sequence[int] | None = None,
    last_duration: int = 0,
    audio_seconds: float = 0,
    **options: str,
) -> Path:
    """Write frames, uint8 (h, w, 3), as a video; `times` and `last_duration` count ticks of 1 / rate seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        stream.options = options
        sound = container.add_stream("aac", rate=16000) if audio_seconds else None
        packets = []
        for time, pixels in zip(times or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if last_duration:
            packets[-1].duration = last_duration
        if sound is not None:
            for first in range(0, int(audio_seconds * 16000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, first
                packets += sound.encode(silence)
            packets += sound.encode(None)
        for packet in packets:
            container.mux(packet)
    return path


def _moving_square(direction: int, start: int, count: int = 20, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A bright square that travels left (-1) or right (1) before a slope of grey."""
    frames = []
    for t in range(count):
        frame = np.repeat(np.linspace(30, 90, height, dtype=np.uint8)[:, None], width, axis=1)[..., None].repeat(3, -1)
        left = (start + direction * 2 * t) % (width - 12)
        frame[18:30, left : left + 12] = (230, 200, 170)
        frames.append(np.ascontiguousarray(frame))
    return frames


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """make_video(path, frames, codec="mpeg4", rate=10, ...) -> path; see _make_video."""
    return _make_video


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two classes, `left` and `right`, of three videos each: 20 frames of 64 x 48 in mp4, mkv, avi. Read only."""
    root = tmp_path_factory.mktemp("videos")
    for label, direction in (("left", -1), ("right", 1)):
        (root / label).mkdir()
        for number, (suffix, codec) in enumerate((("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"))):
            _make_video(root / label / f"clip {number}.{suffix}", _moving_square(direction, 11 * number), codec=codec)
    return root


@pytest.fixture(scope="session")
def make_cache() -> MakeCache:
    """make_cache(caches, ...) -> folder of a finished cache of random codes; see _make_cache."""
    return _make_cache


def _make_cache(
    caches: Path,
    videos: int | Sequence[Any] = 10,
    *,
    name: str = "toy",
    shard_size: int = 4,
    vocab_size: int = 64,
    codes_shape: tuple[int, int, int] = (2, 3, 3),
    levels: tuple[int, ...] | None = None,
    views: Any = 2,
    keep_pixels: Any = "none",
    codebook_VC: np.ndarray | None = None,
    skip: Sequence[str] = (),
    tokenizer: str = "a tokenizer",
    finish: bool = True,
    only_shards: Sequence[int] | None = None,
) -> Path:
    """Codes of a video depend on its path only. `skip`: damaged videos; `only_shards`: which missing ones to make."""
    from data.cache import CacheSpec, CacheWriter
    from data.clips import ClipCuts, ClipSpec, View
    from data.pixels import pack_pixels
    from data.shards import sample_id
    from data.sources import Video

    if isinstance(videos, int):
        videos = [Video(f"{i % 2}/{i:03d}.mp4", 100 + i, label=str(i % 2)) for i in range(videos)]
    clip = ClipSpec(frames=4, size=8, views=views)
    spec = CacheSpec(
        tokenizer=tokenizer,
        codes_shape=codes_shape,
        vocab_size=vocab_size,
        levels=levels,
        clip=clip,
        precision="fp32",
        encode_batch=2,
        keep_pixels=keep_pixels,
        videos=tuple(videos),
    )
    writer = CacheWriter(caches, name, spec, shard_size)
    writer.begin()
    for number in writer.missing():
        if only_shards is not None and number not in only_shards:
            continue
        with writer.open_shard(number) as shard:
            for video in writer.videos(number):
                if video.path in skip:
                    shard.skip(video, "damaged for the test")
                    continue
                rng = np.random.default_rng(int(sample_id(video.path), 16))
                count = views if views != "dense" else int(rng.integers(1, 6))
                codes = rng.integers(vocab_size, size=(count, *codes_shape)).astype(spec.dtype)
                pixels = rng.integers(256, size=(count, clip.frames, clip.size, clip.size, 3), dtype=np.uint8)
                members = {k: m for v, p in enumerate(pixels) for k, m in pack_pixels(keep_pixels, v, p).items()}
                cut = [View(start=4 * v, stride=1, real=4, top=0, left=0, size=8, flip=False) for v in range(count)]
                shard.add(video, codes, ClipCuts(tuple(cut), 4 * count, 25.0), members)
            shard.commit()
    if finish:
        writer.finish(codebook_VC)
    return writer.folder
