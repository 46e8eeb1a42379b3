"""Building blocks of VQ3D.

Legend: B clips, C channels, T H W frames, height, width; t h w a grid of positions, p q r the size of a block of pixels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Block = tuple[int, int, int]


def space_to_depth(video_BTHWC: Tensor, block: Block) -> Tensor:
    """Pack each block of pixels into the channels of one position, (B, T, H, W, C) -> (B, p * q * r * C, t, h, w).

    No convolution then runs at full resolution, which makes a 3-D tokenizer affordable.
    """
    p, q, r = block
    x_BthwC = rearrange(video_BTHWC, "b (t p) (h q) (w r) c -> b t h w (p q r c)", p=p, q=q, r=r)
    # The permuted view is already in channels_last_3d format, so no second copy is needed.
    return x_BthwC.permute(0, 4, 1, 2, 3)


def depth_to_space(x_BCthw: Tensor, block: Block) -> Tensor:
    """Invert `space_to_depth`, (B, p * q * r * C, t, h, w) -> (B, T, H, W, C)."""
    p, q, r = block
    return rearrange(x_BCthw, "b (p q r c) t h w -> b (t p) (h q) (w r) c", p=p, q=q, r=r)


def haar_matrix(size: int) -> Tensor:
    """Return the orthonormal Haar matrix (size, size) for a power of 2. Its rows go from the mean to the finest wavelets."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        coarse = torch.kron(matrix, torch.tensor([[1.0, 1.0]]))
        fine = torch.kron(torch.eye(len(matrix)), torch.tensor([[1.0, -1.0]]))
        matrix = torch.cat([coarse, fine]) / 2**0.5
    return matrix


class Haar(nn.Module):
    """3-D Haar wavelet transform of each block of pixels: an orthonormal change of basis, computed in fp32."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        for name, size in zip("pqr", block, strict=True):
            self.register_buffer(name, haar_matrix(size), persistent=False)

    def forward(self, video_BTHWC: Tensor) -> Tensor:
        """Transform pixels to coefficients, (B, T, H, W, C) -> (B, p * q * r * C, t, h, w)."""
        p, q, r = self.block
        x = rearrange(video_BTHWC, "b (t p) (h q) (w r) c -> b t h w p q r c", p=p, q=q, r=r)
        with torch.autocast(x.device.type, enabled=False):
            x = torch.einsum("bthwpqrc,ip,jq,kr->bthwijkc", x, self.p, self.q, self.r)
        return rearrange(x, "b t h w p q r c -> b (p q r c) t h w")

    def inverse(self, x_BCthw: Tensor) -> Tensor:
        """Transform coefficients to pixels, (B, p * q * r * C, t, h, w) -> (B, T, H, W, C)."""
        p, q, r = self.block
        x = rearrange(x_BCthw, "b (p q r c) t h w -> b t h w p q r c", p=p, q=q, r=r)
        with torch.autocast(x.device.type, enabled=False):
            x = torch.einsum("bthwijkc,ip,jq,kr->bthwpqrc", x, self.p, self.q, self.r)
        return rearrange(x, "b t h w p q r c -> b (t p) (h q) (w r) c")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position, so that no statistics are shared between positions or clips."""

    def forward(self, x_BCthw: Tensor) -> Tensor:
        return super().forward(x_BCthw.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class TimeConv(nn.Conv3d):
    """Convolution with kernel size 3 along time; if causal, over a position and the two before it."""

    def __init__(self, channels: int, *, causal: bool) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(2 if causal else 1, 0, 0))
        self._causal = causal

    def forward(self, x_BCthw: Tensor) -> Tensor:
        # For such short inputs, oneDNN would leave parts of the weight's bf16 gradient unwritten if it did the padding.
        if x_BCthw.shape[2] < 3:
            before, after = (2, 0) if self._causal else (1, 1)
            return F.conv3d(F.pad(x_BCthw, (0, 0, 0, 0, before, after)), self.weight, self.bias)
        y_BCthw = super().forward(x_BCthw)
        # The causal convolution pads both ends with zeros, so its last two positions are dropped.
        return y_BCthw[:, :, : x_BCthw.shape[2]] if self._causal else y_BCthw


class ResidualBlock(nn.Module):
    """Pre-norm residual block with a convolution in space, then one in time (arXiv 1711.11248), initially the identity."""

    def __init__(self, channels: int, *, causal: bool) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.space = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
        self.time = TimeConv(channels, causal=causal)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)  # type: ignore[arg-type]  # the bias is not None

    def forward(self, x_BCthw: Tensor) -> Tensor:
        return x_BCthw + self.time(F.silu(self.space(F.silu(self.norm(x_BCthw)))))


class Upsample(nn.Module):
    """Double the number of positions along h and w (sub-pixel convolution), (B, C, t, h, w) -> (B, C', t, 2h, 2w)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 4 * out_channels, 1)

    def forward(self, x_BCthw: Tensor) -> Tensor:
        x = rearrange(self.conv(x_BCthw), "b (q r c) t h w -> b c t (h q) (w r)", q=2, r=2)
        return x.contiguous(memory_format=torch.channels_last_3d)
