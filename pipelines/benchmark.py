"""Measure this project beside the alternative, as ratios within one run."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from data.cache import TokenCache, find_cache
from data.cache.tool import table
from data.clips import ClipSpec
from data.sources import Source, load_source
from pipelines.benchmarks import (
    Row,
    cache_damage,
    cache_memory,
    cache_reading,
    cache_reuse,
    cache_tokenizing,
    pretrain_growth,
    pretrain_quality,
    pretrain_speed,
    tokenizer_cuda,
    tokenizer_length,
    tokenizer_quality,
)
from pipelines.run import RUNS, command, device_name, start_accelerator


@dataclass
class Benchmark:
    """Measure this project beside the alternative, as ratios within one run."""

    what: Literal["cache", "tokenizer", "pretrain", "quality"]
    """cache: reading, tokenizing, reuse, memory, size and damage of the token cache. tokenizer: quality, speed and code usage
    beside magvit2-pytorch's, long videos; on CUDA also 128x128 and 256x256. pretrain: a training step and training from disk
    beside VideoMAE of transformers, ViT-B; how its time grows, in pictures under runs/benchmark-pretrain. quality: what each
    choice of ARVideo does to its features, many trainings on --cache, in runs/benchmark-quality; started again it goes on."""
    videos: str = "builtin:moving-digits:400:0"
    """For cache, tokenizer and pretrain: a folder, a list file, or a built-in set; built-in videos cost no decoding."""
    clip: ClipSpec = field(default_factory=lambda: ClipSpec(views=4))
    """For cache and tokenizer: what a clip is"""
    cache: str | None = None
    """For quality: a token cache with labels, as in pretrain_ar; by default the newest in caches."""
    only: list[str] = field(
        default_factory=list,
        metadata={
            "help": 'For quality: the settings to compare, e.g. --only "targets 1.0" "keep 0.5"; by default all.'
        },
    )
    scale: float = 1.0
    """Size of the synthetic caches, length of the trainings; 1: those of docs/benchmarks.md."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale is {self.scale}, but must be above 0 and at most 100")
        if self.only and self.what != "quality":
            raise ValueError("only names settings of quality; the other benchmarks have none")
        if self.clip.views == "dense":
            raise ValueError("clip.views is dense, but must be a number here")


def main(config: Benchmark, settings: str) -> dict[str, Any]:
    source = load_source(config.videos)  # a mistake in it shows before anything is measured
    device = start_accelerator().device
    began = time.perf_counter()
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="arvideo-benchmark-") as folder:
            for measure in _measures(config, source, Path(folder), device):
                for row in measure():
                    rows.append(row)
                    print(
                        f"{time.perf_counter() - began:5.0f} s  {'  '.join(row.texts())}", file=sys.stderr, flush=True
                    )
    finally:  # what was measured before something failed, or was stopped, counts
        if rows:
            print(table(["what", "ours", "alternative", "ratio", "reach"], [row.texts() for row in rows]))
    return {
        "table": [{**asdict(row), "device": device_name(device)} for row in rows],
        "device": device_name(device),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _measures(
    config: Benchmark, source: Source, folder: Path, device: torch.device
) -> list[Callable[[], Iterator[Row]]]:
    clip, scale = config.clip, config.scale
    if config.what == "tokenizer":
        return [
            lambda: tokenizer_quality.measure(source, clip, device, scale),
            lambda: tokenizer_length.measure(source, clip, device),
            lambda: tokenizer_cuda.measure(source, clip, device, scale),
        ]
    if config.what == "pretrain":
        return [
            lambda: pretrain_speed.measure(folder, source, device, scale),
            lambda: pretrain_growth.measure(RUNS / "benchmark-pretrain", device, scale),
        ]
    if config.what == "quality":
        cache = TokenCache.open(find_cache(Path("caches"), config.cache))
        return [lambda: pretrain_quality.measure(RUNS / "benchmark-quality", cache, device, scale, config.only)]
    return [
        lambda: cache_reading.measure(folder, scale),
        lambda: cache_tokenizing.measure(folder, source, clip),
        lambda: cache_reuse.measure(folder, scale),
        lambda: cache_memory.measure(folder, scale),
        lambda: cache_damage.measure(folder, scale),
    ]


if __name__ == "__main__":
    command(Benchmark, main)
