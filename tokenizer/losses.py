"""What a tokenizer is trained for, and how well it does.

Legend: B clips, T H W C frames, height, width, colours; V codes of the vocabulary.
"""

import torch
from torch import Tensor, nn

from tokenizer.base import to_float
from tokenizer.vq3d import VQ3D


class Reconstruction(nn.Module):
    """Squared error of the pixels plus the quantizer's own loss; the training loop sees it as it sees any objective."""

    def __init__(self, tokenizer: VQ3D) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of `pixels_BTHWC` (uint8) where `real_B`; `psnr` in dB, `perplexity` and `code_usage` of this batch."""
        real_B = batch["real_B"]
        video_BTHWC = to_float(batch["pixels_BTHWC"])
        out = self.tokenizer(video_BTHWC)
        error_B = (out["video"].float() - video_BTHWC).square().mean((1, 2, 3, 4))
        error = (error_B * real_B).sum() / real_B.sum().clamp_min(1)
        health = code_health(torch.bincount(out["codes"][real_B].flatten(), minlength=self.tokenizer.vocab_size))
        return {"loss": error + out["quantizer"], "psnr": psnr(error.detach()), **health}


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of videos in [-1, 1]."""
    return 10 * torch.log10(4 / squared_error.clamp_min(1e-10))


def code_health(counts_V: Tensor) -> dict[str, Tensor]:
    """`code_usage`: share of the vocabulary in use; `perplexity`: two to the codes' entropy, at most the vocabulary."""
    share_V = counts_V.double() / counts_V.sum().clamp_min(1)
    entropy = -(share_V * share_V.clamp_min(1e-30).log()).sum()
    return {"code_usage": (counts_V > 0).double().mean(), "perplexity": entropy.exp()}
