"""Settings of benchmark."""

from dataclasses import dataclass, field
from typing import Literal

from data.clip_spec import ClipSpec
from pipelines.settings import check_clip


@dataclass
class Benchmark:
    """Benchmark this project against an alternative, and report the ratios measured within one run."""

    what: Literal["cache", "tokenizer", "pretrain", "search"]
    """cache: speed, size, memory and damage handling of the token cache. tokenizer: quality, speed, code usage and long videos
    against magvit2-pytorch. pretrain: training speed against the ViT-B VideoMAE of transformers, with plots in
    runs/benchmark-pretrain. search: a query among 10^6 windows with the index of the extra search; needs 5 GiB in the folder of
    temporary files."""
    videos: str = "builtin:moving-digits:400:0"
    """Folder, list file or built-in set of videos. A built-in set needs no video decoding."""
    clip: ClipSpec = field(default_factory=lambda: ClipSpec(views=4))
    """clips cut from each video (cache and tokenizer)"""
    scale: float = 1.0
    """Scale factor for the size of synthetic caches and features, and the length of training runs; docs/benchmarks.md uses 1."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale must be above 0 and at most 100, got {self.scale}")
        check_clip(self.videos, self.clip)
