"""Settings of benchmark."""

from dataclasses import dataclass, field
from typing import Literal

from data.clips import ClipSpec


@dataclass
class Benchmark:
    """Measure this project beside the alternative, as ratios within one run."""

    what: Literal["cache", "tokenizer", "pretrain"]
    """cache: reading, tokenizing, reuse, memory, size and damage of the token cache. tokenizer: quality, speed and code usage
    beside magvit2-pytorch's, long videos; on CUDA also 128x128 and 256x256. pretrain: a training step and training from disk
    beside VideoMAE of transformers, ViT-B; how its time grows, in pictures under runs/benchmark-pretrain."""
    videos: str = "builtin:moving-digits:400:0"
    """A folder, a list file, or a built-in set; built-in videos cost no decoding."""
    clip: ClipSpec = field(default_factory=lambda: ClipSpec(views=4))
    """For cache and tokenizer: what a clip is"""
    scale: float = 1.0
    """Size of the synthetic caches, length of the trainings; 1: those of docs/benchmarks.md."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale is {self.scale}, but must be above 0 and at most 100")
        if self.clip.views == "dense":
            raise ValueError("clip.views is dense, but must be a number here")
