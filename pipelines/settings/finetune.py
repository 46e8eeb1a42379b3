"""Settings of finetune."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.settings.training import Training


@dataclass(kw_only=True)
class Finetune(Training):
    """Fine-tune a pre-trained model to a classifier of labelled videos, or train the same network from scratch."""

    init: Path | None = None
    """Run folder of pretrain_ar; by default the newest finished one."""
    from_scratch: bool = False
    """Start from random weights, as a baseline, with the architecture and the tokenizer of --init."""
    videos: str | None = None
    """Labelled videos: a folder with one sub-folder per class, a list file, or builtin:moving-digits. They are encoded once, into
    a cache, with the clips and the tokenizer of --init, and --views views of each."""
    tokenizer: str | None = None
    """Place of the tokenizer, if it is neither in the folder of --init nor where it was. For --videos."""
    trust: bool = False
    """Allow a tokenizer that contains code, such as TorchScript."""
    views: int = 4
    """Views of each video that a cache made of --videos holds. A random one is used in each epoch."""
    cache: str | None = None
    """Token cache of labelled videos, made by the tokenizer of --init; by default, without --videos, the cache of --init."""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    steps: int = 500
    lr: float = 1e-2
    """Peak learning rate for batches of 256 clips. That of a run is --lr times --batch_size / 256."""
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.75
    """Factor of the learning rate from each block to the block before it; 1 trains all blocks alike."""
    drop_path: float = 0.1
    """Share of samples for which the last block is skipped; it rises linearly from 0 at the first block."""
    keep_tokens: float = 1.0
    """Share of the tokens of a clip that training sees. A smaller share makes steps faster."""
    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.0
    """Parameter of the beta distribution by which pairs of clips and their labels are mixed; 0 mixes nothing. A clip is
    mixed with one of the same part of the batch (--accumulate) and of the same process."""
    crop_scale: float = 1.0
    """Smallest share of the area of a frame that a random crop has, for models that read pixels; 1 crops nothing."""
    flip: bool = False
    """Mirror half of the clips, for models that read pixels. Refused for classes named after directions."""
    average: float = 0.99
    """Decay of the moving average of the weights that is evaluated and saved; 0 takes the weights themselves."""
    attention: Literal["auto", "plain", "sdpa", "xformers", "flex", "reference"] = "auto"
    """Kernel of all attention layers; auto measures all kernels on the shapes of this run and uses the fastest."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile: steps are faster after about a minute of compilation."""
    recompute: bool = False
    """Use activation checkpointing: less memory, about 20 % more compute, identical results."""
    validate_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.videos is not None and self.cache is not None:
            raise ValueError(f"videos {self.videos} and cache {self.cache} exclude each other")
        for name in ("layer_decay", "average"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.views < 1:
            raise ValueError(f"views must be at least 1, got {self.views}")
