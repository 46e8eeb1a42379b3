"""Settings of extract_features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.settings import check_at_least_1
from pipelines.settings.training import Precision


@dataclass(kw_only=True)
class ExtractFeatures:
    """Write the features of videos, computed by a pre-trained model, as .npz files with an index."""

    run: Path | None = None
    """Run folder of pretrain_ar, a snapshot in it, or a copy of its folder `model`; by default the newest finished run."""
    tokenizer: str | None = None
    """Place of the tokenizer, if it is neither in the folder of the model nor where it was."""
    trust: bool = False
    """Allow a tokenizer that contains code, such as TorchScript."""
    videos: str | None = None
    """Folder with one sub-folder per class, list file, or builtin:moving-digits. Clips are cut and tokenized as in training."""
    cache: str | None = None
    """Token cache of the videos, made by the tokenizer of the model, so that no video is decoded; by default, without --videos,
    the cache of the run."""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    windows: Literal["middle", "dense"] = "middle"
    """middle: one clip from the middle of each video. dense: consecutive clips that cover the whole video."""
    layer: int | None = None
    """Block of the encoder whose output is written, counted from 1; by default the last. The page of a run and probe tell which
    one is best."""
    pool: Literal["clip", "slices", "none"] = "clip"
    """clip: the mean of the tokens of a clip, (width,). slices: the mean of each time slice, (slices, width). none: all tokens,
    (tokens, width)."""
    precision: Precision = "auto"
    """Precision of the model: fp32, bf16 (autocast), or auto: bf16 if the hardware supports it natively."""
    shard_size: int = 256
    """Videos of one .npz file."""
    workers: int | None = None
    """Threads that decode the next videos; 0 decodes in the main thread. By default the cores of this process minus one."""
    out: Path | None = None
    """Folder of the features; by default runs/extract_features-<hash of the settings>."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "shard_size")
        if self.videos is not None and self.cache is not None:
            raise ValueError(f"videos {self.videos} and cache {self.cache} exclude each other")
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer must be at least 1, got {self.layer}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
