"""Tiny caches of random codes that are the same in every run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MakeCache = Callable[..., Path]
"""Type of the fixture `make_cache`."""


def make_cache(
    caches: Path,
    videos: int | Sequence[Any] = 10,
    *,
    name: str = "toy",
    shard_size: int = 4,
    vocab_size: int = 64,
    codes_shape: tuple[int, int, int] = (2, 3, 3),
    codes_per_place: int = 1,
    levels: tuple[tuple[int, ...], ...] | None = None,
    views: Any = 2,
    keep_pixels: Any = "none",
    codebook_VC: np.ndarray | None = None,
    skip: Sequence[str] = (),
    tokenizer: str = "a tokenizer",
    finish: bool = True,
    only_shards: Sequence[int] | None = None,
) -> Path:
    """Write a cache and return its folder. The codes of a video depend only on its path.

    `skip` has paths of damaged videos. `only_shards` has the numbers of the shards to write, if they are missing.
    """
    from data.cache import CacheSpec, CacheWriter
    from data.cache.layout import CodeLayout
    from data.clip_spec import ClipSpec
    from data.pixels import pack_pixels
    from data.shards import sample_id
    from data.sources import Video
    from tests.helpers.cache_contents import some_cuts

    if isinstance(videos, int):
        videos = [Video(f"{i % 2}/{i:03d}.mp4", 100 + i, label=str(i % 2)) for i in range(videos)]
    clip = ClipSpec(frames=4, size=8, views=views)
    layout = CodeLayout(grid=codes_shape, vocab_size=vocab_size, codes_per_place=codes_per_place, levels=levels)
    spec = CacheSpec(
        tokenizer=tokenizer,
        codes=layout,
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
                codes = rng.integers(min(layout.vocabularies), size=(count, *layout.shape)).astype(layout.dtype)
                pixels = rng.integers(256, size=(count, clip.frames, clip.size, clip.size, 3), dtype=np.uint8)
                members = {k: m for v, p in enumerate(pixels) for k, m in pack_pixels(keep_pixels, v, p).items()}
                shard.add(video, codes, some_cuts(count), members)
            shard.commit()
    if finish:
        writer.finish(codebook_VC)
    return writer.folder
