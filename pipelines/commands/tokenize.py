"""Encode each video once and write its codes to webdataset shards (stage one); fit a linear tokenizer first by default."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from data.ahead import ahead
from data.cache import CacheSpec, CacheWriter, TokenCache
from data.cache.earlier import EarlierCodes, recorded_root
from data.cache.layout import CodeLayout
from data.cache.spec import cutting
from data.cache.writer import CodeShard
from data.clip_spec import ClipSpec
from data.clips import ClipCuts
from data.recorded import to_record
from data.sources import Source, Video, load_source
from pipelines.commands.fit_tokenizer import fitted, is_unfitted
from pipelines.engine.bit_rate import bits_per_second, fixed_bits
from pipelines.engine.console import progress, say, say_notes
from pipelines.engine.device import cores, start_accelerator
from pipelines.engine.encoding import Decoded, EncodedVideo, Encoder, decode
from pipelines.engine.recorded_clip import say_recorded_clip
from pipelines.engine.recorded_tokenizer import tokenizer_to_record
from pipelines.engine.run import Run
from pipelines.evaluation.collapse import collapse_warning
from pipelines.settings.tokenize import Tokenize
from tokenizer import VideoTokenizer, load_tokenizer

DECODED_AHEAD = 2**28
"""Maximum number of bytes of decoded clips that a process holds."""
_WRITES_AHEAD = 4
"""Maximum number of videos that wait for the writing thread."""


def main(config: Tokenize, settings: str) -> dict[str, Any]:
    """Complete the cache of these videos, tokenizer and clips, and return its summary."""
    began = time.perf_counter()
    source = load_source(config.videos)
    # Several machines may fill one cache with the same command.
    run = Run("tokenize", config, settings, shared=True)
    accelerator, chosen = start_accelerator(), config.tokenizer
    say_notes(accelerator, config.videos, source)
    if is_unfitted(chosen):
        chosen = fitted(accelerator, chosen, config.videos, config.clip, source)
    else:
        say_recorded_clip(accelerator, [chosen], config.clip)
    tokenizer = load_tokenizer(chosen, trust=config.trust)
    writer = cache_writer(config, source, tokenizer)
    run.begin(accelerator)
    reused = cached(accelerator, writer, replace(config, tokenizer=chosen), source, tokenizer)
    if reused:
        say(accelerator, f"{writer.folder} is finished: nothing is left to do")
    cache = TokenCache.open(writer.folder)
    manifest = cache.manifest
    if warning := collapse_warning(manifest["codes_used"], sum(cache.layout.vocabularies), manifest["codes"]):
        say(accelerator, warning)
    if (short := _short_videos(cache)) > len(cache) / 2:
        say(accelerator, _padding_warning(config.clip, short, len(cache)))
    if bf16 := manifest["bf16"]:
        say(accelerator, f"bf16: {bf16['differ']} of {bf16['codes']} compared codes differ from fp32")
    for entry in manifest["skipped"]:
        say(accelerator, f"skipped {entry['path']}: {entry['reason']}")
    bits = fixed_bits(cache)
    rate = bits_per_second(cache, bits)
    summary = {
        "cache": cache.address,
        "key": cache.key,
        "tokenizer": chosen,
        "videos": len(cache.spec["videos"]),
        "skipped": len(manifest["skipped"]),
        "padded": manifest["padded"],
        "clips": manifest["clips"],
        "codes": manifest["codes"],
        "codes_used": manifest["codes_used"],
        "codes_per_place": cache.layout.codes_per_place,
        "vocab_size": sum(cache.layout.vocabularies),
        "unigram_bits": round(manifest["unigram_bits"], 4),
        "bits_per_place": round(bits * cache.layout.codes_per_place, 4),
        "bits_per_second": rate if rate is None else round(rate, 1),
        "bf16_mismatch": bf16 and bf16["rate"],
        "reused": reused,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return run.finish(accelerator, summary)


def _short_videos(cache: TokenCache) -> int:
    """Return the number of videos that are shorter than a clip. The last one of several dense views is often padded, too."""
    padded_N = np.concatenate([shard.padded_N for shard in cache.shards]).astype(bool)
    return int((padded_N & (cache.views_N == 1) if cache.clip.views == "dense" else padded_N).sum())


def _padding_warning(clip: ClipSpec, short: int, videos: int) -> str:
    span = (clip.frames - 1) * clip.stride + 1
    kind, rate = ("frames", "") if clip.rate is None else ("resampled frames", f", --clip.fps {clip.fps}")
    if clip.seconds is not None:
        rate = f", --clip.seconds {clip.seconds:g}"
    return (
        f"WARNING: {short} of {videos} videos are shorter than a clip, which spans {span} {kind} of a video (--clip.frames "
        f"{clip.frames}, --clip.stride {clip.stride}{rate}), and are padded with their last frame"
    )


def cache_writer(config: Tokenize, source: Source, tokenizer: VideoTokenizer) -> CacheWriter:
    """Return the writer of a cache. The cache key depends on everything that determines the codes."""
    spec = CacheSpec(
        tokenizer=tokenizer.fingerprint(),
        codes=CodeLayout(
            grid=tokenizer.codes_shape(config.clip.frames, config.clip.size, config.clip.size),
            vocab_size=tokenizer.vocab_size,
            codes_per_place=tokenizer.codes_per_place,
            levels=tokenizer.levels,
        ),
        clip=config.clip,
        precision=config.precision,
        encode_batch=config.encode_batch,
        keep_pixels=config.keep_pixels,
        videos=source.videos,
        cutting=cutting(source.version),
    )
    return CacheWriter(config.caches, source.name, spec, config.shard_size)


def fill(
    accelerator: Accelerator, writer: CacheWriter, config: Tokenize, source: Source, tokenizer: VideoTokenizer
) -> None:
    """Make the missing shards until the cache is complete. Other processes and commands may work on the same cache."""
    if accelerator.is_main_process:
        writer.begin()
    accelerator.wait_for_everyone()
    workers = max(0, cores(accelerator) - 1) if config.workers is None else config.workers
    earlier = EarlierCodes(config.caches, writer.preimage, source.root)
    if count := sum(map(earlier.has, source.videos)):
        total = len(source.videos)
        say(
            accelerator,
            f"{count} of {total} videos are taken from earlier caches of these settings; the others are encoded",
        )
    encoder = Encoder(tokenizer, config.encode_batch, config.precision)
    missing = writer.missing()
    bar = progress(accelerator, sum(len(writer.videos(n)) for n in missing), "tokenize")
    # Each process starts at another shard, to avoid competing for the same shard.
    first = len(missing) * accelerator.process_index // accelerator.num_processes
    try:
        while missing:
            if not _make_shards(writer, first, config, source, earlier, encoder, workers, bar):
                bar.set_postfix_str("waiting for shards of other processes")
                time.sleep(1)
            missing = writer.missing()
            bar.update(max(0, (bar.total or 0) - sum(len(writer.videos(n)) for n in missing) - bar.n))
    finally:
        writer.release_all()
    bar.close()
    accelerator.wait_for_everyone()


def complete(
    accelerator: Accelerator, writer: CacheWriter, config: Tokenize, source: Source, tokenizer: VideoTokenizer
) -> None:
    """Make the shards that are missing, and finish the cache."""
    fill(accelerator, writer, config, source, tokenizer.to(accelerator.device))
    if accelerator.is_main_process:
        codebook_VC = tokenizer.codebook()
        writer.finish(None if codebook_VC is None else codebook_VC.detach().cpu().numpy())


def cached(
    accelerator: Accelerator, writer: CacheWriter, config: Tokenize, source: Source, tokenizer: VideoTokenizer
) -> bool:
    """Fill a cache if need be, and record the places of the videos and of `config.tokenizer`.

    Returns whether the cache was finished before.
    """
    # Another command may finish the cache at any moment, so the main process decides for all processes.
    reused = broadcast_object_list([writer.finished])[0]
    if not reused:
        complete(accelerator, writer, config, source, tokenizer)
    if accelerator.is_main_process:
        places = {"tokenizer": tokenizer_to_record(config.tokenizer), "videos": to_record(config.videos)}
        # A finished cache on a read-only disk stays usable.
        try:
            writer.note({**places, "root": recorded_root(source.root)})
        except OSError as error:
            say(accelerator, f"{writer.folder}: could not update the paths of the tokenizer and videos: {error}")
    accelerator.wait_for_everyone()
    return reused


def videos_ahead(config: Tokenize) -> int:
    """Return the number of videos to decode ahead: as many as DECODED_AHEAD allows, at most one shard."""
    # While one video takes long to decode, the tokenizer works on the videos that were decoded before it.
    clip_bytes = config.clip.frames * config.clip.size**2 * 3
    return min(config.shard_size, DECODED_AHEAD // (config.encode_batch * clip_bytes))


def _make_shards(
    writer: CacheWriter,
    first: int,
    config: Tokenize,
    source: Source,
    earlier: EarlierCodes,
    encoder: Encoder,
    workers: int,
    bar: tqdm,
) -> int:
    """Make the shards that no other process has claimed, and return their number.

    `workers` threads decode the next videos, and one thread writes the finished ones, while this thread encodes.
    """

    def decoded(job: tuple[int, Video]) -> Iterator[Decoded]:
        return decode(source, job[1], config.clip, config.keep_pixels, earlier)

    count = 0
    jobs = ((number, video) for number in writer.claims(first) for video in writer.videos(number))
    decoding = ahead(jobs, decoded, workers, config.encode_batch, videos_ahead(config))
    with ThreadPoolExecutor(1) as write_thread, closing(decoding) as videos:
        for number, group in groupby(videos, key=lambda item: item[0][0]):
            with writer.open_shard(number) as shard:
                writes: deque[Future[None]] = deque()
                for encoded in encoder.videos(((video, parts) for (_, video), parts in group), shard.compare):
                    writes.append(write_thread.submit(_add, shard, encoded))
                    if len(writes) > _WRITES_AHEAD:
                        writes.popleft().result()
                    bar.update()
                while writes:
                    writes.popleft().result()
                shard.commit()
            count += 1
    return count


def _add(shard: CodeShard, encoded: EncodedVideo) -> None:
    """Write a video into its shard, or record why it is skipped."""
    if isinstance(encoded.end, ClipCuts):
        shard.add(encoded.video, np.stack(encoded.codes), encoded.end, encoded.pixels)
    else:
        shard.skip(encoded.video, str(encoded.end))
