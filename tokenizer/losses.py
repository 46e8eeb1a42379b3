"""Training loss of a tokenizer.

Legend: B clips, T H W C frames, height, width, colours.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.adversarial import Adversary
from tokenizer.base import to_float
from tokenizer.loss_settings import Losses
from tokenizer.lpips import load_lpips
from tokenizer.measures import code_health, count_codes, psnr
from tokenizer.vq3d import VQ3D


class Reconstruction(nn.Module):
    """Tokenizer with its training loss. The training loop uses this module like an objective.

    Raises:
        ValueError: if a weight file or a package that a loss needs is missing.
    """

    def __init__(self, tokenizer: VQ3D, losses: Losses) -> None:
        super().__init__()
        self.tokenizer, self._losses = tokenizer, losses
        # `Losses` guarantees that the folder is given if, and only if, the weight of LPIPS is not 0.
        self.lpips = load_lpips(losses.lpips_weights) if losses.lpips_weights is not None else None
        self.adversary: Adversary | None = None
        if losses.discriminator != "none":
            start, weight, cap = losses.adversarial_start, losses.adversarial, losses.adversarial_cap
            self.adversary = Adversary(losses.discriminator, start=start, weight=weight, cap=cap)

    @property
    def networks(self) -> list[nn.Module]:
        """Networks whose gradients are clipped separately: the tokenizer, and the adversary if there is one."""
        return [self.tokenizer] if self.adversary is None else [self.tokenizer, self.adversary]

    @property
    def own_betas(self) -> dict[nn.Module, tuple[float, float]]:
        """Betas of AdamW of the networks that have other ones than the tokenizer."""
        betas = self._losses.discriminator_betas
        return {} if self.adversary is None or betas is None else {self.adversary: betas}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `loss` and its parts, all scalars.

        A batch has `pixels_BTHWC` (uint8), `real_B` (bool, False for clips of damaged videos) and `step`. The parts are
        `psnr` (in dB), `quantizer`, the metrics of `code_health`, `lpips` if it has a weight, and `generator`,
        `discriminator` and `adversarial_weight` if there is a discriminator.
        """
        real_B = batch["real_B"]
        # Black clips would enter the statistics of the quantizer and of the discriminator.
        pixels_BTHWC = batch["pixels_BTHWC"][_substitutes(real_B)]
        video_BTHWC = to_float(pixels_BTHWC)
        out = self.tokenizer(pixels_BTHWC)
        quantizer = out["quantizer"] * real_B.any()
        error_BTHWC = out["video"].float() - video_BTHWC
        squared = _mean(error_BTHWC.square().mean((1, 2, 3, 4)), real_B)
        error = squared if self._losses.pixels == "mse" else _mean(error_BTHWC.abs().mean((1, 2, 3, 4)), real_B)
        numbers = {"psnr": psnr(squared.detach()), "quantizer": quantizer}
        # A clip of one frame has no motion.
        if self._losses.motion and error_BTHWC.shape[1] > 1:
            error = error + self._losses.motion * _mean(error_BTHWC.diff(dim=1).square().mean((1, 2, 3, 4)), real_B)
        if self.lpips is not None:
            frames_NCHW = rearrange(video_BTHWC, "b t h w c -> (b t) c h w")
            reconstructed_NCHW = rearrange(out["video"].float(), "b t h w c -> (b t) c h w")
            distance_BT = self.lpips(reconstructed_NCHW, frames_NCHW).unflatten(0, (len(real_B), -1))
            numbers["lpips"] = _mean(distance_BT.mean(1), real_B)
            error = error + self._losses.lpips * numbers["lpips"]
        loss = error + quantizer
        if self.adversary is not None:
            input_BCTHW = rearrange(video_BTHWC, "b t h w c -> b c t h w")
            reconstructed_BCTHW = rearrange(out["video"].float(), "b t h w c -> b c t h w")
            numbers |= self.adversary(input_BCTHW, reconstructed_BCTHW, error, self.tokenizer.last_layer, batch["step"])
            loss = loss + (numbers["generator"] + numbers["discriminator"]) * real_B.any()
        # Non-finite activations can produce out-of-range codes; clamp before they are counted.
        codes = out["codes"][real_B].clamp(0, self.tokenizer.vocab_size - 1)
        return {"loss": loss, **numbers, **code_health(count_codes(codes, self.tokenizer.vocabularies))}


def _substitutes(real_B: Tensor) -> Tensor:
    """Return the index of an undamaged clip for each clip: its own, or those of the batch in turn; its own if there are none."""
    damaged_B = real_B.logical_not()
    undamaged_first_B = torch.argsort(damaged_B.to(torch.uint8), stable=True)
    turn_B = (damaged_B.cumsum(0) - 1) % real_B.sum().clamp_min(1)
    return torch.where(real_B, torch.arange(len(real_B), device=real_B.device), undamaged_first_B[turn_B])


def _mean(value_B: Tensor, real_B: Tensor) -> Tensor:
    """Return the mean over undamaged clips; 0 if there are none."""
    return (value_B * real_B).sum() / real_B.sum().clamp_min(1)
