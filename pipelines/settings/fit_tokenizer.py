"""Settings of fit_tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

from data.clip_spec import ClipSpec
from pipelines.settings import check_at_least_1, check_clip


@dataclass(kw_only=True)
class FitTokenizer:
    """Fit a linear tokenizer, which has no network, to videos: principal components of blocks of pixels, in seconds."""

    videos: str = "builtin:moving-digits"
    """Folder with one sub-folder per class, list file, or builtin:moving-digits."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """clips cut from each video"""
    name: str = "linear-2x8x8-4x1000"
    """linear-TxHxW-GxV: blocks of T frames of HxW pixels; G codes per block, each with a vocabulary of at most V."""
    clips: int = 128
    """Training videos to which the tokenizer is fitted, spread evenly; the first clip of each."""
    out: Path | None = None
    """Run folder; by default runs/fit_tokenizer-<hash of the settings>."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "clips")
        check_clip(self.videos, self.clip, dense=True)
