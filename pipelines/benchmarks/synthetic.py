"""Inputs of the measurements: caches of random codes, lists of videos, and decoded clips."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from data.cache import CacheSpec, CacheWriter
from data.cache.layout import CodeLayout
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, View
from data.sources import Source, Video
from pipelines.engine.encoding import DecodedClip, decode

_CLIP = ClipSpec()
_VOCABULARY = 1000


def synthetic_cache(
    folder: Path,
    videos: Sequence[Video],
    *,
    views: int,
    codes_shape: tuple[int, int, int] = (8, 8, 8),
    shard_size: int = 256,
    tokenizer: str = "none",
    clip: ClipSpec = _CLIP,
) -> Path:
    """Write a finished cache of random codes, in the format that tokenize writes, and return its folder."""
    spec = CacheSpec(
        tokenizer=tokenizer,
        codes=CodeLayout(grid=codes_shape, vocab_size=_VOCABULARY, levels=((8, 5, 5, 5),)),
        clip=replace(clip, views=views),
        precision="fp32",
        encode_batch=8,
        keep_pixels="none",
        videos=tuple(videos),
    )
    writer = CacheWriter(folder, "synthetic", spec, shard_size)
    writer.begin()
    rng = np.random.default_rng(0)
    for number in writer.missing():
        with writer.open_shard(number) as shard:
            for video in writer.videos(number):
                cuts = tuple(
                    View(start=start, stride=1, real=clip.frames, top=0, left=left, size=clip.size, flip=False)
                    for start, left in rng.integers((300, 50), size=(views, 2)).tolist()
                )
                codes = rng.integers(_VOCABULARY, size=(views, *codes_shape), dtype=np.uint16)
                shard.add(video, codes, ClipCuts(cuts, 320, 25.0), {})
            shard.commit()
    writer.finish(None)
    writer.note({"videos": "none", "tokenizer": tokenizer})
    return writer.folder


def numbered_videos(count: int) -> list[Video]:
    """List `count` videos in ten classes; their files do not exist."""
    return [Video(f"class{i % 10}/video_{i:07d}.mp4", 100_000 + i, label=f"class{i % 10}") for i in range(count)]


def decoded_clips(source: Source, videos: Sequence[Video], clip: ClipSpec, most: int) -> list[DecodedClip]:
    """Decode up to `most` clips of the videos, and skip damaged videos.

    Raises:
        ValueError: if no video is usable.
    """
    parts = (part for video in videos for part in decode(source, video, clip, "none"))
    clips = list(islice((part for part in parts if isinstance(part, DecodedClip)), most))
    if not clips:
        raise ValueError(f"{source.name}: no usable video")
    return clips
