"""Stage one: write each video's codes once, as webdataset shards. Without a tokenizer it trains one first."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.cache import CacheSpec, CacheWriter, TokenCache
from data.clips import Clips, ClipSpec, read_clips
from data.decoding import DamagedVideo
from data.pixels import KeepPixels, pack_pixels, refuse_too_long
from data.shards import sample_id
from data.sources import Source, Video, load_source
from pipelines.config import parse
from pipelines.run import Run, command, progress, say, start_accelerator
from pipelines.train_tokenizer import COLLAPSED, TrainTokenizer, collapse_warning, train
from pipelines.training import make_accelerator
from tokenizer import VideoTokenizer, load_tokenizer


@dataclass(kw_only=True)
class Tokenize:
    """Stage one: write each video's codes once, as webdataset shards. Without a tokenizer it trains one first."""

    videos: str = "builtin:moving-digits"
    """Folder with a sub-folder per class, list file, or builtin:moving-digits."""
    tokenizer: str | None = None
    """Run folder of train_tokenizer, save_pretrained folder, or hub id; by default one is trained on the videos."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """What a clip is"""
    caches: Path = Path("caches")
    """Where caches live."""
    keep_pixels: KeepPixels = "none"
    """Keep the clips' pixels beside their codes: raw, or jpeg (a twentieth of the size)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the tokenizer; bf16 is faster on GPUs and changes a few codes in a thousand."""
    encode_batch: int = 8
    """Clips that go through the tokenizer together; part of the cache's key, so that no code depends on its neighbours."""
    shard_size: int = 256
    """Videos of one shard."""
    workers: int = 0
    """Processes that decode videos; 0: the encoding process itself."""
    out: Path | None = None
    """Run folder; by default runs/tokenize-<hash of the settings>."""

    def __post_init__(self) -> None:
        for name in ("encode_batch", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, but must not be negative")
        refuse_too_long(self.keep_pixels, self.clip.frames, self.clip.size)


def main(config: Tokenize, settings: str) -> dict[str, Any]:
    began = time.perf_counter()
    source = load_source(config.videos)
    run = Run("tokenize", config, settings)
    if config.tokenizer is None:
        accelerator, chosen = _trained_here(config, source)
    else:
        accelerator, chosen = start_accelerator(), config.tokenizer
    tokenizer = load_tokenizer(chosen)
    writer = CacheWriter(config.caches, source.name, _cache_spec(config, source, tokenizer), config.shard_size)
    run.begin(accelerator)
    reused = writer.finished
    if reused:
        say(accelerator, f"{writer.folder} is finished: nothing is left to do")
    else:
        _fill(accelerator, writer, config, source, tokenizer.to(accelerator.device))
        if accelerator.is_main_process:
            writer.finish(tokenizer.codebook())
    if accelerator.is_main_process:
        writer.note({"tokenizer": chosen, "videos": config.videos})
    accelerator.wait_for_everyone()
    cache = TokenCache(writer.folder)
    if cache.manifest["codes_used"] < COLLAPSED * min(cache.vocab_size, cache.manifest["codes"]):
        say(accelerator, collapse_warning(cache.manifest["codes_used"], cache.vocab_size))
    for entry in cache.manifest["skipped"]:
        say(accelerator, f"skipped {entry['path']}: {entry['reason']}")
    return run.finish(accelerator, _summary(cache, chosen, reused, began))


def _trained_here(config: Tokenize, source: Source) -> tuple[Accelerator, str]:
    """The run folder of the tokenizer that `train_tokenizer` makes of these videos and clips by default."""
    flags = [f"--clip.{name}={str(value).lower()}" for name, value in asdict(config.clip).items()]
    training, settings = parse(TrainTokenizer, ["--videos", config.videos, *flags])
    run = Run("train_tokenizer", training, settings, about=source.digest)
    accelerator = make_accelerator(training, run)
    if not run.finished:
        say(accelerator, f"no --tokenizer given: training one on {config.videos}")
    return accelerator, train(run, accelerator, training, source)["run"]


def _cache_spec(config: Tokenize, source: Source, tokenizer: VideoTokenizer) -> CacheSpec:
    return CacheSpec(
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


def _summary(cache: TokenCache, tokenizer: str, reused: bool, began: float) -> dict[str, Any]:
    manifest = cache.manifest
    return {
        "cache": str(cache.folder),
        "key": cache.key,
        "tokenizer": tokenizer,
        "videos": len(cache.spec["videos"]),
        "skipped": len(manifest["skipped"]),
        "padded": manifest["padded"],
        "clips": manifest["clips"],
        "codes": manifest["codes"],
        "codes_used": manifest["codes_used"],
        "unigram_bits": round(manifest["unigram_bits"], 4),
        "reused": reused,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _fill(
    accelerator: Accelerator, writer: CacheWriter, config: Tokenize, source: Source, tokenizer: VideoTokenizer
) -> None:
    """Make the missing shards; every process makes each world-size-th of them."""
    if accelerator.is_main_process:
        writer.begin()
    accelerator.wait_for_everyone()
    missing = broadcast_object_list([writer.missing()])[0]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    bar = progress(accelerator, sum(len(writer.videos(n)) for n in mine), "tokenize")
    for number in mine:
        _write_shard(writer, number, config, source, tokenizer, bar)
    bar.close()
    accelerator.wait_for_everyone()


def _write_shard(
    writer: CacheWriter, number: int, config: Tokenize, source: Source, tokenizer: VideoTokenizer, bar: tqdm
) -> None:
    skipped: list[dict[str, str]] = []
    with writer.open_shard(number) as shard:
        usable = _usable(_read(source, writer.videos(number), config), skipped, bar)
        for video, clips, codes_VTHW in _encode(usable, tokenizer, config):
            facts = {
                "path": video.path,
                "size": video.size,
                "label": video.label,
                "group": video.group,
                "split": video.split,
            }
            facts["padded"] = clips.padded
            text = json.dumps({**facts, "views": clips.describe()}, sort_keys=True).encode()
            members = {
                "codes.npy": writer.pack(codes_VTHW),
                "json": text,
                **pack_pixels(config.keep_pixels, clips.pixels_VTHWC),
            }
            shard.add(sample_id(video.path), members, facts)
        shard.commit(skipped=skipped)


class _Videos(Dataset):
    """Index -> video and its clips, or the reason why there are none."""

    def __init__(self, source: Source, videos: tuple[Video, ...], clip: ClipSpec) -> None:
        self.source, self.videos, self.clip = source, videos, clip

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Video, Clips | str]:
        video = self.videos[index]
        try:
            return video, read_clips(self.source, video, self.clip)
        except DamagedVideo as damage:
            return video, str(damage)


def _read(source: Source, videos: tuple[Video, ...], config: Tokenize) -> Iterator[tuple[Video, Clips | str]]:
    context = "forkserver" if config.workers else None
    return iter(
        DataLoader(
            _Videos(source, videos, config.clip),
            batch_size=None,
            num_workers=config.workers,
            multiprocessing_context=context,
        )
    )


def _usable(
    read: Iterator[tuple[Video, Clips | str]], skipped: list[dict[str, str]], bar: tqdm
) -> Iterator[tuple[Video, Clips]]:
    for video, clips in read:
        bar.update()
        if isinstance(clips, str):
            skipped.append({"path": video.path, "reason": clips})
        else:
            yield video, clips


def _encode(
    videos: Iterator[tuple[Video, Clips]], tokenizer: VideoTokenizer, config: Tokenize
) -> Iterator[tuple[Video, Clips, np.ndarray]]:
    """Codes (V, t, h, w) of every video. Clips of several videos share batches of one size, the last filled with zeros."""
    waiting: list[tuple[Video, Clips]] = []
    pixels: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for video, clips in videos:
        waiting.append((video, clips))
        pixels.extend(clips.pixels_VTHWC)
        while len(pixels) >= config.encode_batch:
            codes.extend(_encode_batch(pixels[: config.encode_batch], tokenizer, config))
            del pixels[: config.encode_batch]
        while waiting and len(codes) >= config.clip.views:
            yield *waiting.pop(0), np.stack(codes[: config.clip.views])
            del codes[: config.clip.views]
    while pixels:
        codes.extend(_encode_batch(pixels[: config.encode_batch], tokenizer, config))
        del pixels[: config.encode_batch]
    for i, (video, clips) in enumerate(waiting):
        yield video, clips, np.stack(codes[i * config.clip.views : (i + 1) * config.clip.views])


def _encode_batch(clips: list[np.ndarray], tokenizer: VideoTokenizer, config: Tokenize) -> np.ndarray:
    filled = np.zeros((config.encode_batch, *clips[0].shape), np.uint8)
    filled[: len(clips)] = clips
    pixels = torch.from_numpy(filled).to(next(tokenizer.parameters()).device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on how many threads share them; parallel work is for processes
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        codes = tokenizer.encode(pixels)[: len(clips)].cpu().numpy()
    torch.set_num_threads(threads)
    return codes


if __name__ == "__main__":
    command(Tokenize, main)
