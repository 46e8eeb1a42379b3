"""VQ3D, the 3-D video tokenizer of this project.

Legend: B clips, T H W C frames, height, width, colours; t h w the grid of places, N = t * h * w, D inner channels.
With several codes per place, codes have a last axis of them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from tokenizer.base import VideoTokenizer, hash_module, to_float, to_uint8
from tokenizer.blocks import ChannelNorm, Haar, ResidualBlock, Upsample, depth_to_space, space_to_depth
from tokenizer.model_card import model_card
from tokenizer.quantizers import make_quantizer

SIZES = {"tiny": (128,), "small": (128, 256), "base": (128, 256, 512)}
"""Channels at each resolution, the finest first. Each further resolution halves height and width."""
NAME = re.compile(
    r"vq3d(?:-(tiny|small|base))?(-causal)?-([1-9]\d?)x([1-9]\d?)x([1-9]\d?)-((?:[1-9]\d*x)?[a-z]+[1-9]\d*)", re.ASCII
)

LARGEST_WIDTH, LARGEST_DEPTH = 4096, 256


class VQ3D(VideoTokenizer, PyTorchModelHubMixin, library_name="arvideo"):
    """Autoencoder: stem, residual blocks, quantizer, residual blocks, inverse stem. No convolution runs at full resolution.

    Args:
        name: size (default tiny), whether causal, stride along (t, h, w), codes per place (default one), quantizer and vocabulary
            size, for example vq3d-2x8x8-fsq1000, vq3d-2x8x8-4xfsq1000 or vq3d-base-causal-4x16x16-emavq1024. Sizes: tiny,
            small, base. Quantizers: fsq, emavq, lfq, simvq. A causal tokenizer takes 1 + k * t frames and encodes the first frame
            alone, like an image.
        stem: contents of the input channels: `space` for the pixels of a block, `haar` for their wavelet coefficients.
        width: channels at the finest resolution, a multiple of 8, doubled at each further resolution; default: by size.
        depth: residual blocks at each resolution, in the encoder and in the decoder.
        options: options of the quantizer, for example {decay: 0.95}; tokenizer/quantizers.py lists them.

    Raises:
        ValueError: if the name is invalid, or a setting is out of range.
    """

    def __init__(
        self,
        *,
        name: str = "vq3d-2x8x8-fsq1000",
        stem: Literal["space", "haar"] = "space",
        width: int | None = None,
        depth: int = 2,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        size, self.causal, self.stride, quantizer = _parse_name(name)
        self.name = name.replace("-tiny", "")
        if width is not None and (not 8 <= width <= LARGEST_WIDTH or width % 8):
            raise ValueError(f"tokenizer width {width} is not a multiple of 8 from 8 to {LARGEST_WIDTH}")
        if not 0 <= depth <= LARGEST_DEPTH:
            raise ValueError(f"tokenizer depth {depth} must be from 0 to {LARGEST_DEPTH}")
        if stem not in ("space", "haar"):
            raise ValueError(f"tokenizer stem {stem!r} must be space or haar")
        # Tuples become lists, as in JSON, so that the fingerprint is the same after saving and loading.
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in (options or {}).items()}
        self._stem, self._options = stem, sorted(settings.items())
        self.quantizer = make_quantizer(quantizer, options or {})
        self.vocab_size, self.levels = self.quantizer.vocab_size, self.quantizer.levels
        self.codes_per_place = self.quantizer.codes_per_place
        widths = SIZES[size] if width is None else tuple(width << i for i in range(len(SIZES[size])))
        finer = 2 ** (len(widths) - 1)
        t, h, w = self.stride
        if h % finer or w % finer:
            raise ValueError(f"{name}: with size {size}, both spatial strides must be multiples of {finer}")
        self.block = (t, h // finer, w // finer)
        """Size of one position at the finest resolution, in pixels along (t, h, w)."""
        self.haar = Haar(self.block) if stem == "haar" else None
        block_channels = 3 * math.prod(self.block)
        self.encoder = _encoder(block_channels, widths, depth, self.quantizer.channels, self.causal)
        self.decoder = _decoder(block_channels, widths, depth, self.quantizer.channels, self.causal)
        blocks = depth * len(widths)
        self.context = (2 * blocks, 0) if self.causal else (blocks, blocks)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # missing in the stubs of torch

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight at which the gradients of adversarial and reconstruction loss are compared."""
        return self.decoder[-1].weight  # type: ignore[return-value]

    def forward(self, pixels_BTHWC: Tensor) -> dict[str, Tensor]:
        """Reconstruct clips, uint8 (B, T, H, W, 3).

        Returns:
            `video`: float (B, T, H, W, 3), nominally in [-1, 1]; `codes`: as from `encode`; `quantizer`: its auxiliary loss.

        Raises:
            ValueError: if pixels are not uint8, or a size does not fit the stride.
        """
        self.codes_shape(*pixels_BTHWC.shape[1:4])
        quantized_BND, codes_Bthw, auxiliary = self._quantized(pixels_BTHWC)
        video_BTHWC = self._reconstructed(quantized_BND, codes_Bthw.shape[1:4])
        return {"video": video_BTHWC, "codes": codes_Bthw, "quantizer": auxiliary}

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        return self._quantized(pixels_BTHWC)[1]

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        return to_uint8(self._reconstructed(self.quantizer.vectors(codes_Bthw.flatten(1, 3)), codes_Bthw.shape[1:4]))

    def codebook(self) -> Tensor | None:
        return self.quantizer.codebook()

    def fingerprint(self) -> str:
        config = {"class": type(self).__name__, "name": self.name, "stem": self._stem, "options": self._options}
        return hash_module(self, config)

    def generate_model_card(self, training: Mapping[str, object] | None = None) -> ModelCard:  # type: ignore[override]
        """Return README.md of `save_pretrained`. `training`: facts of the training by name, given as `model_card_kwargs`."""
        return model_card(self, training or {})

    def _quantized(self, pixels_BTHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors (B, N, D), codes as from `encode`, and loss. If causal, repeat the first frame to fill a block."""
        video_BTHWC = to_float(pixels_BTHWC)
        if self.causal:
            ahead_BTHWC = video_BTHWC[:, :1].expand(-1, self.stride[0] - 1, -1, -1, -1)
            video_BTHWC = torch.cat([ahead_BTHWC, video_BTHWC], dim=1)
        x_BDthw = space_to_depth(video_BTHWC, self.block) if self.haar is None else self.haar(video_BTHWC)
        z_BDthw = self.encoder(x_BDthw.contiguous(memory_format=torch.channels_last_3d))
        quantized_BND, codes_BN, auxiliary = self.quantizer(rearrange(z_BDthw, "b d t h w -> b (t h w) d"))
        return quantized_BND, codes_BN.unflatten(1, z_BDthw.shape[2:]), auxiliary

    def _reconstructed(self, quantized_BND: Tensor, grid: torch.Size) -> Tensor:
        t, h, w = grid
        z_BDthw = rearrange(quantized_BND, "b (t h w) d -> b d t h w", t=t, h=h, w=w)
        x_BDthw = self.decoder(z_BDthw.contiguous(memory_format=torch.channels_last_3d))
        video_BTHWC = depth_to_space(x_BDthw, self.block) if self.haar is None else self.haar.inverse(x_BDthw.float())
        return video_BTHWC[:, self.stride[0] - 1 :] if self.causal else video_BTHWC


def _parse_name(name: str) -> tuple[str, bool, tuple[int, int, int], str]:
    """Return size, whether causal, stride and quantizer of a name."""
    match = NAME.fullmatch(name)
    if match is None:
        expected = "vq3d[-size][-causal]-TxHxW-[Gx]QUANTIZERvocab, for example vq3d-base-causal-4x16x16-4xemavq1024"
        raise ValueError(f"invalid tokenizer name {name!r}: expected {expected}")
    t, h, w = (int(match[i]) for i in (3, 4, 5))
    # s & (s - 1) is 0 for powers of 2 only.
    if any(s & (s - 1) or s > 32 for s in (t, h, w)):
        raise ValueError(f"{name}: strides are powers of 2 up to 32, got {t}x{h}x{w}")
    return match[1] or "tiny", match[2] is not None, (t, h, w), match[6]


def _encoder(pixels: int, widths: tuple[int, ...], depth: int, channels: int, causal: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv3d(pixels, widths[0], 1)]
    for i, width in enumerate(widths):
        if i:
            layers.append(nn.Conv3d(widths[i - 1], width, (1, 2, 2), stride=(1, 2, 2)))
        layers += [ResidualBlock(width, causal=causal) for _ in range(depth)]
    last = nn.Conv3d(widths[-1], channels, 1)
    # Small initial weights keep vectors out of the flat part of the tanh of FSQ.
    nn.init.normal_(last.weight, std=0.5 / widths[-1] ** 0.5)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # the bias is not None
    return nn.Sequential(*layers, ChannelNorm(widths[-1]), last)


def _decoder(pixels: int, widths: tuple[int, ...], depth: int, channels: int, causal: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv3d(channels, widths[-1], 1)]
    for i in reversed(range(len(widths))):
        layers += [ResidualBlock(widths[i], causal=causal) for _ in range(depth)]
        if i:
            layers.append(Upsample(widths[i], widths[i - 1]))
    return nn.Sequential(*layers, nn.Conv3d(widths[0], pixels, 1))
