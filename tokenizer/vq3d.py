"""VQ3D: this project's own 3-D video tokenizer.

Legend: B clips, T H W C frames, height, width, colours; t h w the grid of codes, N = t * h * w, D channels inside.
"""

import math

import torch
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from tokenizer.base import VideoTokenizer, hash_module, to_float, to_uint8
from tokenizer.blocks import ResidualBlock, depth_to_space, space_to_depth
from tokenizer.quantizers import QuantizerName, make_quantizer


class VQ3D(VideoTokenizer, PyTorchModelHubMixin, library_name="arvideo"):
    """Space-to-depth, residual blocks, quantizer, residual blocks, depth-to-space.

    Args:
        stride: pixels of one code along (t, h, w).
        width: channels of the residual blocks, a multiple of 8.
        depth: residual blocks of the encoder, and of the decoder.
        quantizer: `fsq`, or `ema-vq` for a learned codebook.
        levels: FSQ: values of each digit; their product is the vocabulary.
        codebook_size: EMA-VQ: vectors of the codebook.
        codebook_channels: EMA-VQ: channels of each vector.

    Raises:
        ValueError: for a width that the norms cannot group.
    """

    def __init__(
        self,
        *,
        stride: tuple[int, int, int] = (2, 8, 8),
        width: int = 128,
        depth: int = 2,
        quantizer: QuantizerName = "fsq",
        levels: tuple[int, ...] = (8, 5, 5, 5),
        codebook_size: int = 1024,
        codebook_channels: int = 8,
    ) -> None:
        super().__init__()
        if width < 1 or width % 8:
            raise ValueError(f"tokenizer width {width} is not a multiple of 8")
        if min(stride) < 1 or depth < 0:
            raise ValueError(f"tokenizer stride {tuple(stride)} must be 1 or more each, and depth {depth} not negative")
        self.stride = (stride[0], stride[1], stride[2])  # a saved configuration gives lists
        self.quantizer = make_quantizer(
            quantizer, levels=tuple(levels), codebook_size=codebook_size, codebook_channels=codebook_channels
        )
        self.vocab_size, self.levels = self.quantizer.vocab_size, self.quantizer.levels
        block, channels = 3 * math.prod(stride), self.quantizer.channels
        self.encoder = nn.Sequential(
            nn.Conv3d(block, width, 1), *(ResidualBlock(width) for _ in range(depth)), nn.Conv3d(width, channels, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv3d(channels, width, 1), *(ResidualBlock(width) for _ in range(depth)), nn.Conv3d(width, block, 1)
        )
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch has it, its stubs do not

    def codes_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The grid of codes of a clip.

        Raises:
            ValueError: if the stride does not divide it.
        """
        t, h, w = self.stride
        if min(frames, height, width) < 1 or frames % t or height % h or width % w:
            raise ValueError(
                f"a clip of {frames} frames of {height}x{width} is not a multiple "
                f"of the tokenizer's stride {self.stride}"
            )
        return frames // t, height // h, width // w

    def forward(self, video_BTHWC: Tensor) -> dict[str, Tensor]:
        """Float in [-1, 1] -> `video` (its reconstruction), `codes` (B, t, h, w), `quantizer` (its auxiliary loss)."""
        z_BDthw = self.encoder(space_to_depth(video_BTHWC, self.stride))
        grid = z_BDthw.shape[2:]
        quantized_BND, codes_BN, auxiliary = self.quantizer(rearrange(z_BDthw, "b d t h w -> b (t h w) d"))
        return {
            "video": self._decode(quantized_BND, grid),
            "codes": codes_BN.unflatten(1, grid),
            "quantizer": auxiliary,
        }

    @torch.no_grad()
    def encode(self, pixels_BTHWC: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> codes, int64 (B, t, h, w)."""
        z_BDthw = self.encoder(space_to_depth(to_float(pixels_BTHWC), self.stride))
        _, codes_BN, _ = self.quantizer(rearrange(z_BDthw, "b d t h w -> b (t h w) d"))
        return codes_BN.unflatten(1, z_BDthw.shape[2:])

    @torch.no_grad()
    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Codes -> uint8 (B, T, H, W, 3)."""
        return to_uint8(self._decode(self.quantizer.vectors(codes_Bthw.flatten(1)), codes_Bthw.shape[1:]))

    def codebook(self) -> Tensor | None:
        """Vectors of a learned codebook, (vocab_size, channels); None for FSQ."""
        return self.quantizer.codebook()

    def fingerprint(self) -> str:
        """Hash of configuration and weights."""
        return hash_module(self, {"class": type(self).__name__, "stride": self.stride, "levels": self.levels})

    def _decode(self, quantized_BND: Tensor, grid: torch.Size) -> Tensor:
        t, h, w = grid
        z_BDthw = rearrange(quantized_BND, "b (t h w) d -> b d t h w", t=t, h=h, w=w)
        return depth_to_space(self.decoder(z_BDthw.to(memory_format=torch.channels_last_3d)), self.stride)
