"""Settings of train_tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.clips import ClipSpec
from pipelines.settings import class_setting
from pipelines.settings.training import Training
from tokenizer.loss_settings import Losses

if TYPE_CHECKING:
    from tokenizer import VQ3D

    MakeTokenizer = Callable[[], VQ3D]
else:
    MakeTokenizer = Any


def _model() -> tuple[Any, type]:
    from tokenizer import VQ3D

    return Callable[[], VQ3D], VQ3D


@dataclass(kw_only=True)
class TrainTokenizer(Training):
    """Train VQ3D, this project's tokenizer, on a folder of videos."""

    videos: str = "builtin:moving-digits"
    """Folder with a sub-folder per class, list file, or builtin:moving-digits."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """What a clip is"""
    model: MakeTokenizer = class_setting(_model, "Tokenizer to train; --model.help VQ3D lists its settings.")
    loss: Losses = field(default_factory=Losses)
    """What is minimised"""
    average: float = 0.99
    """Decay of the moving average of the weights, which is what is validated and saved; 0: the weights themselves."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Clips of one step, of all processes together."""
    lr: float = 3e-3
    """Highest learning rate."""
    weight_decay: float = 0.01
    """Of AdamW, on matrices only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip.views == "dense":
            raise ValueError("clip.views dense is for tokenize; train a tokenizer on a number of views")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}, but must be from 0 to less than 1")
