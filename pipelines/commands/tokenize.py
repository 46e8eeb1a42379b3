"""Stage one: write each video's codes once, as webdataset shards. Without a tokenizer it trains one first."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from data.ahead import ahead
from data.cache import CacheSpec, CacheWriter, TokenCache
from data.cache.writer import CodeShard
from data.clips import ClipCuts
from data.sources import Source, Video, load_source
from pipelines.commands.train_tokenizer import train
from pipelines.engine.config import parse
from pipelines.engine.console import progress, say
from pipelines.engine.device import cores, start_accelerator
from pipelines.engine.encoding import Decoded, EncodedVideo, Encoder, decode
from pipelines.engine.run import Run
from pipelines.engine.training import make_accelerator
from pipelines.evaluation.collapse import COLLAPSED, collapse_warning
from pipelines.settings.tokenize import Tokenize
from pipelines.settings.train_tokenizer import TrainTokenizer
from tokenizer import VideoTokenizer, load_tokenizer

DECODED_AHEAD = 2**28
"""Bytes of decoded clips that a process may hold."""


def main(config: Tokenize, settings: str) -> dict[str, Any]:
    began = time.perf_counter()
    source = load_source(config.videos)
    run = Run("tokenize", config, settings)
    if config.tokenizer is None:
        accelerator, chosen = _trained_here(config, source)
    else:
        accelerator, chosen = start_accelerator(), config.tokenizer
    tokenizer = load_tokenizer(chosen, trust=config.trust)
    writer = cache_writer(config, source, tokenizer)
    run.begin(accelerator)
    reused = broadcast_object_list([writer.finished])[0]  # another command may finish it at any moment
    if reused:
        say(accelerator, f"{writer.folder} is finished: nothing is left to do")
    else:
        fill(accelerator, writer, config, source, tokenizer.to(accelerator.device))
        if accelerator.is_main_process:
            codebook_VC = tokenizer.codebook()
            writer.finish(None if codebook_VC is None else codebook_VC.detach().cpu().numpy())
    if accelerator.is_main_process:
        _note(accelerator, writer, {"tokenizer": chosen, "videos": config.videos})
    accelerator.wait_for_everyone()
    cache = TokenCache.open(writer.folder)
    if cache.manifest["codes_used"] < COLLAPSED * min(cache.vocab_size, cache.manifest["codes"]):
        say(accelerator, collapse_warning(cache.manifest["codes_used"], cache.vocab_size))
    if cache.manifest["bf16"]:
        bf16 = cache.manifest["bf16"]
        say(
            accelerator,
            f"bf16: {bf16['differ']} of {bf16['codes']} codes that were made in fp32 too came out differently",
        )
    for entry in cache.manifest["skipped"]:
        say(accelerator, f"skipped {entry['path']}: {entry['reason']}")
    return run.finish(accelerator, _summary(cache, chosen, reused, began))


def _note(accelerator: Accelerator, writer: CacheWriter, made_with: dict[str, str]) -> None:
    """Say where things are; a finished cache on a disk that cannot be written to is as good."""
    try:
        writer.note(made_with)
    except OSError as error:
        say(accelerator, f"{writer.folder}: keeps its old note of where the videos are: {error}")


def _trained_here(config: Tokenize, source: Source) -> tuple[Accelerator, str]:
    """The run folder of the tokenizer that `train_tokenizer` makes of these videos and clips by default."""
    clip = replace(config.clip, views=4) if config.clip.views == "dense" else config.clip
    flags = [f"--clip.{name}={str(value).lower()}" for name, value in asdict(clip).items()]
    training, settings = parse(TrainTokenizer, ["--videos", config.videos, *flags])
    run = Run("train_tokenizer", training, settings, about=source.digest)
    accelerator = make_accelerator(training, run)
    if not run.finished:
        say(accelerator, f"no --tokenizer given: training one on {config.videos}")
    return accelerator, train(run, accelerator, training, source)["run"]


def cache_writer(config: Tokenize, source: Source, tokenizer: VideoTokenizer) -> CacheWriter:
    """Where the codes go; its key says what they are made of."""
    spec = CacheSpec(
        tokenizer=tokenizer.fingerprint(),
        codes_shape=tokenizer.codes_shape(config.clip.frames, config.clip.size, config.clip.size),
        vocab_size=tokenizer.vocab_size,
        levels=tokenizer.levels,
        clip=config.clip,
        precision=config.precision,
        encode_batch=config.encode_batch,
        keep_pixels=config.keep_pixels,
        videos=source.videos,
    )
    return CacheWriter(config.caches, source.name, spec, config.shard_size)


def _summary(cache: TokenCache, tokenizer: str, reused: bool, began: float) -> dict[str, Any]:
    manifest = cache.manifest
    return {
        "cache": cache.address,
        "key": cache.key,
        "tokenizer": tokenizer,
        "videos": len(cache.spec["videos"]),
        "skipped": len(manifest["skipped"]),
        "padded": manifest["padded"],
        "clips": manifest["clips"],
        "codes": manifest["codes"],
        "codes_used": manifest["codes_used"],
        "vocab_size": cache.vocab_size,
        "unigram_bits": round(manifest["unigram_bits"], 4),
        "bf16_mismatch": manifest["bf16"] and manifest["bf16"]["rate"],
        "reused": reused,
        "seconds": round(time.perf_counter() - began, 1),
    }


def fill(
    accelerator: Accelerator, writer: CacheWriter, config: Tokenize, source: Source, tokenizer: VideoTokenizer
) -> None:
    """Make the missing shards, together with whatever other process is at it, until there are none."""
    if accelerator.is_main_process:
        writer.begin()
    accelerator.wait_for_everyone()
    workers = max(0, cores(accelerator) - 1) if config.workers is None else config.workers
    encoder = Encoder(tokenizer, config.encode_batch, config.precision)
    missing = writer.missing()
    bar = progress(accelerator, sum(len(writer.videos(n)) for n in missing), "tokenize")
    first = len(missing) * accelerator.process_index // accelerator.num_processes
    try:
        while missing:
            if not _make_shards(writer, first, config, source, encoder, workers, bar):
                bar.set_postfix_str("waiting for the shards that other processes are making")
                time.sleep(1)
            missing = writer.missing()
            bar.update(max(0, (bar.total or 0) - sum(len(writer.videos(n)) for n in missing) - bar.n))
    finally:
        writer.release_all()
    bar.close()
    accelerator.wait_for_everyone()


def videos_ahead(config: Tokenize) -> int:
    """Videos whose clips may wait to be encoded: some take long to decode, so as many as memory and claims allow."""
    clip_bytes = config.clip.frames * config.clip.size**2 * 3
    return min(config.shard_size, DECODED_AHEAD // (config.encode_batch * clip_bytes))


def _make_shards(
    writer: CacheWriter, first: int, config: Tokenize, source: Source, encoder: Encoder, workers: int, bar: tqdm
) -> int:
    """Make the shards that nobody else is making, and return how many. Threads decode ahead, another one writes behind."""

    def jobs() -> Iterator[tuple[int, Video]]:
        for number in writer.claims(first):
            for video in writer.videos(number):
                yield number, video

    def decoded(job: tuple[int, Video]) -> Iterator[Decoded]:
        return decode(source, job[1], config.clip, config.keep_pixels)

    made = 0
    decoding = ahead(jobs(), decoded, workers, config.encode_batch, videos_ahead(config))
    with ThreadPoolExecutor(1) as behind, closing(decoding) as videos:
        for number, group in groupby(videos, key=lambda item: item[0][0]):
            with writer.open_shard(number) as shard:
                written = deque([behind.submit(lambda: None)])
                for encoded in encoder.videos(((video, parts) for (_, video), parts in group), shard.compare):
                    written.append(behind.submit(_add, shard, encoded))
                    if len(written) > 4:
                        written.popleft().result()
                    bar.update()
                while written:
                    written.popleft().result()
                shard.commit()
            made += 1
    return made


def _add(shard: CodeShard, encoded: EncodedVideo) -> None:
    if isinstance(encoded.end, ClipCuts):
        codes_Vthw = np.stack(encoded.codes)
        shard.add(encoded.video, codes_Vthw, encoded.end, encoded.pixels)
    else:
        shard.skip(encoded.video, str(encoded.end))
