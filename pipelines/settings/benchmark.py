"""Settings of benchmark."""

from dataclasses import dataclass, field
from typing import Literal

from data.clips import ClipSpec


@dataclass
class Benchmark:
    """Benchmark this project against an alternative, and report the ratios measured within one run."""

    what: Literal["cache", "tokenizer", "pretrain", "quality"]
    """cache: speed, size, memory and damage handling of the token cache. tokenizer: quality, speed, code usage and long videos
    against magvit2-pytorch. pretrain: training speed against VideoMAE of transformers, ViT-B, with plots in
    runs/benchmark-pretrain. quality: effect of each choice of ARVideo on its features, from many trainings on --cache in
    runs/benchmark-quality; a second start continues the first."""
    videos: str = "builtin:moving-digits:400:0"
    """Videos for cache, tokenizer and pretrain: a folder, a list file, or a built-in set, which costs no decoding."""
    clip: ClipSpec = field(default_factory=lambda: ClipSpec(views=4))
    """clips cut from each video (cache and tokenizer)"""
    cache: str | None = None
    """Token cache with labels for quality, named as in pretrain_ar; by default the newest one in caches."""
    only: list[str] = field(
        default_factory=list,
        metadata={
            "help": 'Settings that quality compares, for example --only "targets 1.0" "keep 0.5"; by default all.'
        },
    )
    scale: float = 1.0
    """Factor on the size of synthetic caches and the length of trainings; docs/benchmarks.md uses 1."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale must be above 0 and at most 100, got {self.scale}")
        if self.only and self.what != "quality":
            raise ValueError(f"only selects settings of the quality benchmark, {self.what} has none")
        if self.clip.views == "dense":
            raise ValueError("clip.views must be a number for a benchmark, got dense")
