"""What a tokenizer is trained for.

Legend: B clips, T H W C frames, height, width, colours; V codes of the vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.adversarial import Adversary
from tokenizer.base import to_float
from tokenizer.lpips import load_lpips
from tokenizer.measures import code_health, psnr
from tokenizer.vq3d import VQ3D


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


class Reconstruction(nn.Module):
    """A tokenizer and its losses; the training loop sees it as it sees any objective.

    Raises:
        ValueError: if weights or a package that a loss needs are missing.
    """

    def __init__(self, tokenizer: VQ3D, losses: Losses) -> None:
        super().__init__()
        self.tokenizer, self._losses = tokenizer, losses
        lpips, kind = losses.lpips_weights, losses.discriminator
        self.lpips = load_lpips(lpips) if losses.lpips and lpips is not None else None
        self.adversary = (
            None
            if kind == "none"
            else Adversary(kind, start=losses.adversarial_start, weight=losses.adversarial, cap=losses.adversarial_cap)
        )

    @property
    def networks(self) -> list[nn.Module]:
        """The tokenizer, and what it is trained against."""
        return [self.tokenizer] if self.adversary is None else [self.tokenizer, self.adversary]

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`loss` of `pixels_BTHWC` (uint8) where `real_B`, at `step`; `psnr` in dB, its parts, and the codes' health."""
        real_B = batch["real_B"]
        video_BTHWC = to_float(batch["pixels_BTHWC"])
        out = self.tokenizer(batch["pixels_BTHWC"])
        error_BTHWC = out["video"].float() - video_BTHWC
        squared = _mean(error_BTHWC.square().mean((1, 2, 3, 4)), real_B)
        error = squared if self._losses.pixels == "mse" else _mean(error_BTHWC.abs().mean((1, 2, 3, 4)), real_B)
        numbers = {"psnr": psnr(squared.detach()), "quantizer": out["quantizer"]}
        if self.lpips is not None:
            seen, made = (rearrange(x, "b t h w c -> (b t) c h w") for x in (video_BTHWC, out["video"].float()))
            numbers["lpips"] = _mean(self.lpips(made, seen).unflatten(0, (len(real_B), -1)).mean(1), real_B)
            error = error + self._losses.lpips * numbers["lpips"]
        loss = error + out["quantizer"]
        if self.adversary is not None:  # clips of damaged videos are black in both, which teaches it nothing
            seen, made = (rearrange(x, "b t h w c -> b c t h w") for x in (video_BTHWC, out["video"].float()))
            numbers |= self.adversary(seen, made, error, self.tokenizer.last_layer, batch["step"])
            loss = loss + numbers["generator"] + numbers["discriminator"]
        codes = out["codes"][real_B].clamp(
            0, self.tokenizer.vocab_size - 1
        )  # of what is not finite they may be anything
        counts_V = torch.bincount(codes.flatten(), minlength=self.tokenizer.vocab_size)
        return {"loss": loss, **numbers, **code_health(counts_V)}


def _mean(value_B: Tensor, real_B: Tensor) -> Tensor:
    return (value_B * real_B).sum() / real_B.sum().clamp_min(1)
