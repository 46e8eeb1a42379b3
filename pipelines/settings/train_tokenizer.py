"""Settings of train_tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.clip_spec import ClipSpec
from pipelines.settings import check_clip, class_setting
from pipelines.settings.training import Training
from tokenizer.loss_settings import Losses

if TYPE_CHECKING:
    from tokenizer import VQ3D
else:
    VQ3D = Any


def _model() -> tuple[Any, type]:
    from tokenizer import VQ3D

    return Callable[[], VQ3D], VQ3D


@dataclass(kw_only=True)
class TrainTokenizer(Training):
    """Train VQ3D, this project's tokenizer, on a folder of videos."""

    videos: str = "builtin:moving-digits"
    """Folder with one sub-folder per class, list file, or builtin:moving-digits."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """clips cut from each video"""
    model: Callable[[], VQ3D] = class_setting(_model)
    """Tokenizer to train. --model.help VQ3D lists its settings."""
    loss: Losses = field(default_factory=Losses)
    """training loss"""
    average: float = 0.99
    """Decay of the exponential moving average (EMA) of the weights. The averaged weights are validated and saved; 0 turns the
    average off."""
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.videos, self.clip)
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be at least 0 and below 1, got {self.average}")
