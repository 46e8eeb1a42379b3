"""What a tokenizer's training minimises, as settings; importable without torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What is minimised, beside the quantizer's own loss. For codes that a model learns from, the first line is enough.

    Raises:
        ValueError: for a setting that cannot be, or misses another.
    """

    pixels: Literal["mse", "l1"] = "mse"
    """Squared or absolute error of pixels in [-1, 1]."""
    lpips: float = 0.0
    """Weight of the perceptual distance LPIPS; with it, --loss.lpips_weights."""
    lpips_weights: Path | None = None
    """Folder with vgg16-397923af.pth (VGG16, as torchvision publishes it) and vgg.pth (LPIPS 0.1)."""
    discriminator: Literal["none", "patch", "3d"] = "none"
    """Train against one: taming's on each frame, or one on clips."""
    adversarial: float = 0.8
    """Weight of its loss relative to the reconstruction's, by the gradients that reach the last layer."""
    adversarial_start: int = 1000
    """Step from which on it acts on the tokenizer; it learns from the first."""
    adversarial_cap: float = 1.0
    """The most that its weight may become."""

    def __post_init__(self) -> None:
        if self.pixels not in ("mse", "l1"):
            raise ValueError(f"loss.pixels is {self.pixels!r}, but must be mse or l1")
        if self.discriminator not in ("none", "patch", "3d"):
            raise ValueError(f"loss.discriminator is {self.discriminator!r}, but must be none, patch or 3d")
        if not 0 <= self.lpips < math.inf:
            raise ValueError(f"loss.lpips is {self.lpips}, but must not be negative")
        if self.lpips and self.lpips_weights is None:
            raise ValueError("loss.lpips needs --loss.lpips_weights, the folder of its published weights")
        if self.lpips_weights is not None and not self.lpips:
            raise ValueError("loss.lpips_weights does nothing without --loss.lpips, the weight of the distance")
        for name in ("adversarial", "adversarial_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, but must be above 0")
        if self.adversarial_start < 0:
            raise ValueError(f"loss.adversarial_start is {self.adversarial_start}, but must not be negative")
