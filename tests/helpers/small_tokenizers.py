"""Small VQ3D tokenizers and clips."""

from typing import Any

import torch
from torch import Tensor

from tokenizer import VQ3D

QUANTIZERS = ["fsq240", "emavq16", "lfq16", "simvq16"]
SIZES = ["", "-small", "-base"]


def pixels(clips: int = 3, frames: int = 4, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    """Return random clips made of blocks of one colour plus noise, uint8 (B, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (clips, -(-frames // 2), -(-height // 4), -(-width // 4), 3), generator=generator)
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fine = fine[:, :frames, :height, :width]
    return (fine + torch.randint(0, 20, fine.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def build(name: str = "vq3d-2x4x4-fsq240", *, fitted: bool = True, **settings: Any) -> VQ3D:
    """Build a tokenizer in evaluation mode whose codes differ between clips.

    Args:
        fitted: train a learned codebook on two batches first.
    """
    torch.manual_seed(0)
    tokenizer = VQ3D(name=name, **{"width": 8, "depth": 1, **settings})
    with torch.no_grad():
        # Includes the convolutions in time, which are initialised to zero.
        for p in tokenizer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if "emavq" in name and fitted:
        for seed in (10, 11):
            tokenizer.train()(pixels(16, tokenizer.frames_of(3), *(2 * s for s in tokenizer.stride[1:]), seed=seed))
    return tokenizer.eval()


def state(tokenizer: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {name: value.clone() for name, value in tokenizer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_rounding_apart(a: Tensor, b: Tensor) -> bool:
    """Return whether pixels differ by at most one grey level in at most 1 of 1,000 places.

    A convolution may sum in another order if a clip is longer, which can change the rounding to a grey level.
    """
    difference = (a.int() - b.int()).abs()
    return a.shape == b.shape and bool(difference.max() <= 1 and (difference > 0).float().mean() < 1e-3)
