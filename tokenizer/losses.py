"""What a tokenizer is trained for.

Legend: B clips, T H W C frames, height, width, colours; V codes of the vocabulary.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.adversarial import Adversary
from tokenizer.base import to_float
from tokenizer.loss_settings import Losses
from tokenizer.lpips import load_lpips
from tokenizer.measures import code_health, psnr
from tokenizer.vq3d import VQ3D


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
