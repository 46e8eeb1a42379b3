"""Filling a cache, beside decoding alone and encoding alone; and how many bytes a code costs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from data.ahead import ahead
from data.cache import TokenCache
from data.clips import ClipCuts, ClipSpec
from data.sources import Source, Video
from pipelines.benchmarks import Row
from pipelines.benchmarks.synthetic import synthetic_cache
from pipelines.commands.tokenize import cache_writer, fill
from pipelines.engine.device import cores
from pipelines.engine.encoding import Decoded, DecodedClip, Encoder, decode
from pipelines.settings.tokenize import Tokenize
from tokenizer import VQ3D

_ROUNDS = 3


def measure(folder: Path, source: Source, clip: ClipSpec) -> Iterator[Row]:
    """Clips per second, the best of rounds that take turns; the tokenizer has random weights."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    tokenizer = VQ3D().eval().to(accelerator.device)
    encoder = Encoder(tokenizer, Tokenize.encode_batch, "fp32")
    workers = max(0, cores(accelerator) - 1)
    clips = _clips_of(source, clip)
    listed = len(source.videos) * _views(clip)

    def whole(round_: int) -> int:
        config = Tokenize(clip=clip, caches=folder / f"round{round_}")
        writer = cache_writer(config, source, tokenizer)
        fill(accelerator, writer, config, source, tokenizer)
        writer.finish(None)
        return int(TokenCache.open(writer.folder).manifest["clips"])

    ways: dict[str, Callable[[int], int]] = {
        "whole": whole,
        "decoding": lambda _: _decode_all(source, clip, workers),
        "encoding": lambda _: _encode_all(encoder, source.videos[0], clips, listed),
    }
    speeds = dict.fromkeys(ways, 0.0)
    for round_ in range(_ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            count = way(round_)
            speeds[name] = max(speeds[name], count / (time.perf_counter() - began))
    slower = min("decoding", "encoding", key=lambda name: speeds[name])
    for name in ("decoding", "encoding"):
        reach = "≥ 0.85" if name == slower else ""
        yield Row(
            what=f"tokenizing {len(source.videos)} videos of {source.name}, one process",
            unit="clips/s",
            ours=speeds["whole"],
            peer=speeds[name],
            alternative="encoding alone, 1 thread" if name == "encoding" else f"decoding alone, {workers} thread(s)",
            ratio=speeds["whole"] / speeds[name],
            reach=reach,
        )
    for views in (1, 4, 16):
        size = _bytes_per_code(folder / f"views{views}", source, replace(clip, views=views))
        reach = "≤ 2.3" if views == 16 else ""
        yield Row(what=f"bytes per code of 2 bytes, {views} views of 512 codes", unit="bytes", ours=size, reach=reach)


def _views(clip: ClipSpec) -> int:
    assert isinstance(clip.views, int)
    return clip.views


def _clips_of(source: Source, clip: ClipSpec) -> list[DecodedClip]:
    """Some real clips, to be encoded again and again."""
    parts = (part for video in source.videos for part in decode(source, video, clip, "none"))
    clips = list(islice((part for part in parts if isinstance(part, DecodedClip)), 256))
    if not clips:
        raise ValueError(f"{source.name}: holds no video that can be used")
    return clips


def _decode_all(source: Source, clip: ClipSpec, workers: int) -> int:
    def work(video: Video) -> Iterator[Decoded]:
        return decode(source, video, clip, "none")

    parts = (part for _, given in ahead(source.videos, work, workers, 8, 256) for part in given)
    return sum(isinstance(part, DecodedClip) for part in parts)


def _encode_all(encoder: Encoder, video: Video, clips: list[DecodedClip], count: int) -> int:
    many: list[Decoded] = [clips[i % len(clips)] for i in range(count)]
    (encoded,) = encoder.videos([(video, iter([*many, ClipCuts((), 0, None)]))])
    return len(encoded.codes)


def _bytes_per_code(folder: Path, source: Source, clip: ClipSpec) -> float:
    """Everything in the folder of a cache of these videos, with random codes, divided by its codes."""
    cache = TokenCache.open(synthetic_cache(folder, source.videos, views=_views(clip), clip=clip))
    files = [path.stat().st_size for path in Path(cache.address).rglob("*") if path.is_file()]
    return float(np.sum(files) / cache.manifest["codes"])
