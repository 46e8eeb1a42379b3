"""Throughput of tokenize compared with decoding alone and encoding alone, and disk bytes per code."""

import time
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from accelerate import Accelerator

from data.ahead import ahead
from data.cache import TokenCache
from data.clip_spec import ClipSpec
from data.clips import ClipCuts
from data.sources import Source, Video
from pipelines.benchmarks import Row, comparison
from pipelines.benchmarks.synthetic import decoded_clips, synthetic_cache
from pipelines.commands.tokenize import cache_writer, fill
from pipelines.engine.device import cores
from pipelines.engine.encoding import Decoded, DecodedClip, Encoder, decode
from pipelines.settings.tokenize import Tokenize
from tokenizer import VQ3D

_ROUNDS = 3


def measure(folder: Path, source: Source, clip: ClipSpec) -> Iterator[Row]:
    """Yield clips per second (best of interleaved rounds, random weights), and bytes per code for 1, 4 and 16 views."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    tokenizer = VQ3D().eval().to(accelerator.device)
    encoder = Encoder(tokenizer, Tokenize.encode_batch, "fp32")
    workers = max(0, cores(accelerator) - 1)
    clips = decoded_clips(source, source.videos, clip, 256)
    clip_count = len(source.videos) * int(clip.views)  # the settings of benchmark refuse "dense"

    def tokenize(round_: int) -> int:
        config = Tokenize(clip=clip, caches=folder / f"round{round_}")
        writer = cache_writer(config, source, tokenizer)
        fill(accelerator, writer, config, source, tokenizer)
        writer.finish(None)
        return int(TokenCache.open(writer.folder).manifest["clips"])

    work: dict[str, Callable[[int], int]] = {
        "tokenizing": tokenize,
        "decoding": lambda _: _decode_all(source, clip, workers),
        "encoding": lambda _: _encode_all(encoder, source.videos[0], clips, clip_count),
    }
    speeds = dict.fromkeys(work, 0.0)
    for round_ in range(_ROUNDS):
        for name, run in work.items():
            began = time.perf_counter()
            count = run(round_)
            speeds[name] = max(speeds[name], count / (time.perf_counter() - began))
    slower = min("decoding", "encoding", key=lambda name: speeds[name])
    what = f"tokenizing {len(source.videos)} videos of {source.name}, one process"
    for name, threads in (("decoding", f"{workers} thread(s)"), ("encoding", "1 thread")):
        target = "≥ 0.85" if name == slower else ""
        yield comparison(what, "clips/s", speeds["tokenizing"], speeds[name], f"{name} alone, {threads}", target)
    for views in (1, 4, 16):
        cache = TokenCache.open(synthetic_cache(folder / f"views{views}", source.videos, views=views, clip=clip))
        size = sum(path.stat().st_size for path in Path(cache.address).rglob("*") if path.is_file())
        what, reach = f"bytes on disk per 2-byte code, {views} view(s) of 512 codes", "≤ 2.3" if views == 16 else ""
        yield Row(what, "bytes", size / cache.manifest["codes"], reach=reach)


def _decode_all(source: Source, clip: ClipSpec, workers: int) -> int:
    videos = ahead(source.videos, lambda video: decode(source, video, clip, "none"), workers, 8, 256)
    return sum(isinstance(part, DecodedClip) for _, parts in videos for part in parts)


def _encode_all(encoder: Encoder, video: Video, clips: list[DecodedClip], count: int) -> int:
    """Encode `count` clips, repeated from `clips`, as views of one video, and return the number of encoded clips."""
    # The encoder expects ClipCuts after the last clip of a video.
    parts: Iterator[Decoded] = chain(islice(cycle(clips), count), [ClipCuts((), 0, None)])
    (encoded,) = encoder.videos([(video, parts)])
    return len(encoded.codes)
