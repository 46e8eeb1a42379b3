"""Quantizers of vector-quantize-pytorch behind one signature.

Legend: B samples, N vectors, C channels, V codes.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, VectorQuantize

QuantizerName = Literal["fsq", "ema-vq"]


class Quantizer(nn.Module):
    """Vectors (B, N, C) -> (quantized vectors (B, N, C), codes (B, N) int64, auxiliary loss). Always in fp32."""

    vocab_size: int
    channels: int
    levels: tuple[int, ...] | None = None

    def forward(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """Quantized vectors of codes, (...) -> (..., C)."""
        raise NotImplementedError

    def codebook(self) -> Tensor | None:
        """Vectors of a learned codebook, (V, C)."""
        return None


class FiniteScalar(Quantizer):
    """FSQ (arXiv 2309.15505): every channel rounded to a few levels. No state: nothing to collapse or synchronise."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.fsq = FSQ(list(levels))
        self.levels = levels
        self.vocab_size = self.fsq.codebook_size
        self.channels = len(levels)

    def forward(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z_BNC.device.type, enabled=False):
            quantized, codes = self.fsq(z_BNC.float())
        return quantized, codes.long(), quantized.new_zeros(())

    def vectors(self, codes: Tensor) -> Tensor:
        return self.fsq.implicit_codebook[codes]


class MovingAverage(Quantizer):
    """VQ whose codebook follows its inputs (arXiv 1711.00937, appendix A.1).

    Started by k-means, dead codes revived, gradients by the rotation trick (arXiv 2410.06424).
    """

    def __init__(self, vocab_size: int, channels: int) -> None:
        super().__init__()
        self.vocab_size, self.channels = vocab_size, channels
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.vq = VectorQuantize(
            dim=channels,
            codebook_size=vocab_size,
            decay=0.99,
            kmeans_init=True,
            threshold_ema_dead_code=2,
            rotation_trick=True,
            commitment_weight=0.25,
            sync_codebook=distributed,
        )

    def forward(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training and not self.vq._codebook.initted:
            raise ValueError("the codebook was never trained: its codes would mean whatever is encoded first")
        with torch.autocast(z_BNC.device.type, enabled=False):
            return self.vq(z_BNC.float())

    def vectors(self, codes: Tensor) -> Tensor:
        return self.codebook()[codes]

    def codebook(self) -> Tensor:
        return self.vq.codebook


def make_quantizer(
    name: QuantizerName, *, levels: tuple[int, ...], codebook_size: int, codebook_channels: int
) -> Quantizer:
    """The quantizer of a name.

    Raises:
        ValueError: if there is none, or the settings are not for it.
    """
    if name == "fsq":
        if len(levels) < 1 or min(levels) < 3:
            raise ValueError(f"FSQ levels {levels} must be 3 or more each")
        return FiniteScalar(levels)
    if name == "ema-vq":
        if codebook_size < 2 or codebook_channels < 1:
            raise ValueError(f"a codebook of {codebook_size} vectors of {codebook_channels} channels is none")
        return MovingAverage(codebook_size, codebook_channels)
    raise ValueError(f"quantizer {name!r} is neither fsq nor ema-vq")
