"""Settings of benchmark."""

from dataclasses import dataclass, field
from typing import Literal

from data.clips import ClipSpec


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
