"""Settings of the training loss of a tokenizer. This module does not import torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses added to the quantizer's own loss. If the codes are for pre-training only, the pixel error is enough.

    Raises:
        ValueError: if a value is out of range, or a setting is given without another setting that it needs.
    """

    pixels: Literal["mse", "l1"] = "mse"
    """Squared (mse) or absolute (l1) error of pixels in [-1, 1]."""
    motion: float = 0.0
    """Weight of the squared error of the differences between frames. It keeps more of the motion in the codes."""
    lpips: float = 0.0
    """Weight of the perceptual distance LPIPS; a weight above 0 needs --loss.lpips_weights."""
    lpips_weights: Path | None = None
    """Folder with vgg16-397923af.pth (VGG16, published by torchvision) and vgg.pth (LPIPS 0.1)."""
    discriminator: Literal["none", "patch", "3d"] = "none"
    """Discriminator to train against: patch (PatchGAN of taming-transformers, on single frames) or 3d (on clips)."""
    adversarial: float = 0.8
    """Weight of the adversarial loss. The loss is also scaled so that its gradient at the last layer is as large as that of the
    reconstruction loss."""
    adversarial_start: int = 1000
    """First step with the adversarial loss; the discriminator is trained from step 0."""
    adversarial_cap: float = 1.0
    """Upper limit of the adaptive weight of the adversarial loss."""
    discriminator_betas: tuple[float, float] | None = None
    """Decay rates of the two moments of AdamW for the discriminator; by default those of the tokenizer (--betas). VQGAN has
    [0.5, 0.9] for both networks."""

    def __post_init__(self) -> None:
        if self.pixels not in ("mse", "l1"):
            raise ValueError(f"loss.pixels is {self.pixels!r}, but must be mse or l1")
        if self.discriminator not in ("none", "patch", "3d"):
            raise ValueError(f"loss.discriminator is {self.discriminator!r}, but must be none, patch or 3d")
        for name in ("motion", "lpips"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, but must be finite and at least 0")
        if self.lpips and self.lpips_weights is None:
            raise ValueError("loss.lpips needs --loss.lpips_weights, the folder with the published weights")
        if self.lpips_weights is not None and not self.lpips:
            raise ValueError("loss.lpips_weights has no effect without --loss.lpips, the weight of the loss")
        for name in ("adversarial", "adversarial_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, but must be above 0")
        if self.discriminator_betas is not None and not all(0 <= beta < 1 for beta in self.discriminator_betas):
            raise ValueError(
                f"loss.discriminator_betas is {list(self.discriminator_betas)}, but both must be at least 0 and below 1"
            )
        if self.discriminator_betas is not None and self.discriminator == "none":
            raise ValueError("loss.discriminator_betas has no effect without --loss.discriminator")
        if self.adversarial_start < 0:
            raise ValueError(f"loss.adversarial_start is {self.adversarial_start}, but must not be negative")
