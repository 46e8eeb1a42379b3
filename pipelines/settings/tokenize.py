"""Settings of tokenize."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.clip_spec import ClipSpec
from data.pixels import KeepPixels, check_jpeg_height
from pipelines.settings import check_at_least_1, check_clip, recorded_in


@dataclass(kw_only=True)
class Tokenize:
    """Stage one: encode each video once and write its codes to webdataset shards; fits a linear tokenizer first by default."""

    videos: str = "builtin:moving-digits"
    """Folder with one sub-folder per class, list file, or builtin:moving-digits."""
    tokenizer: str = "linear"
    """linear, or a name such as linear-2x8x8-8x1000, for a linear tokenizer that is fitted to the videos in seconds; or the run
    folder of train_tokenizer or fit_tokenizer, a save_pretrained folder, a hub id, taming:FOLDER or torchscript:FOLDER."""
    trust: bool = False
    """Allow a tokenizer that contains code, such as TorchScript."""
    clip: ClipSpec = recorded_in("tokenizer", ClipSpec)
    """clips cut from each video; by default like those that the tokenizer was trained on, if it is a run folder"""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    keep_pixels: KeepPixels = "none"
    """Store the pixels of the clips with their codes: raw, or jpeg (a twentieth of the size). All stored pixels of a video stay
    in memory until the video is written; long videos with dense views need much memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the tokenizer; bf16 is faster on GPUs and changes a few codes in a thousand."""
    encode_batch: int = 8
    """Clips per tokenizer call. Part of the cache key: another batch size rounds differently and can change codes."""
    shard_size: int = 256
    """Videos per shard."""
    workers: int | None = None
    """Threads that decode the next videos; 0 decodes in the main thread. By default the cores of this process minus one."""
    out: Path | None = None
    """Run folder; by default runs/tokenize-<hash of the settings>."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "encode_batch", "shard_size")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        check_clip(self.videos, self.clip, dense=True)
        check_jpeg_height(self.keep_pixels, self.clip.frames, self.clip.size)
