"""Settings of tokenize."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.clips import ClipSpec
from data.pixels import KeepPixels, check_jpeg_height


@dataclass(kw_only=True)
class Tokenize:
    """Stage one: write each video's codes once, as webdataset shards. Without a tokenizer it trains one first."""

    videos: str = "builtin:moving-digits"
    """Folder with a sub-folder per class, list file, or builtin:moving-digits."""
    tokenizer: str | None = None
    """Run folder of train_tokenizer, save_pretrained folder, hub id, taming:FOLDER or torchscript:FOLDER; by default one is
    trained on the videos."""
    trust: bool = False
    """Run the tokenizer if it is a program, as TorchScript is."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """What a clip is"""
    caches: Path = Path("caches")
    """Where caches live."""
    keep_pixels: KeepPixels = "none"
    """Keep the clips' pixels beside their codes: raw, or jpeg (a twentieth of the size). Those of one video are held in
    memory until it is done, which counts with long ones and dense views."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the tokenizer; bf16 is faster on GPUs and changes a few codes in a thousand."""
    encode_batch: int = 8
    """Clips that go through the tokenizer together; part of the cache's key, so that no code depends on its neighbours."""
    shard_size: int = 256
    """Videos of one shard."""
    workers: int | None = None
    """Threads that decode ahead; by default one less than this process has cores. 0: nothing is done ahead."""
    out: Path | None = None
    """Run folder; by default runs/tokenize-<hash of the settings>."""

    def __post_init__(self) -> None:
        for name in ("encode_batch", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}, but must not be negative")
        check_jpeg_height(self.keep_pixels, self.clip.frames, self.clip.size)
