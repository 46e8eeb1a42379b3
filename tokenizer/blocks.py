"""Building blocks of VQ3D.

Legend: B clips, C channels, T H W frames, height, width; t h w the grid of codes.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def space_to_depth(video_BTHWC: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Every block of pixels into the channels of one place, (B, T, H, W, C) -> (B, pt * ph * pw * C, t, h, w).

    No convolution then runs at full resolution, which is what makes a 3-D tokenizer affordable.
    """
    pt, ph, pw = stride
    return rearrange(video_BTHWC, "b (t pt) (h ph) (w pw) c -> b (pt ph pw c) t h w", pt=pt, ph=ph, pw=pw)


def depth_to_space(x_BCthw: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Inverse of `space_to_depth`."""
    pt, ph, pw = stride
    return rearrange(x_BCthw, "b (pt ph pw c) t h w -> b (t pt) (h ph) (w pw) c", pt=pt, ph=ph, pw=pw)


class ResidualBlock(nn.Module):
    """A convolution in space, one in time (arXiv 1711.11248), norm before, residual around; the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.space = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        nn.init.zeros_(self.time.weight)

    def forward(self, x_BCthw: Tensor) -> Tensor:
        return x_BCthw + self.time(F.silu(self.space(F.silu(self.norm(x_BCthw)))))
