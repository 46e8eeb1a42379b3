"""What every tokenizer is to the rest of the house.

Legend: B clips, T H W C frames, height, width, colours; t h w the grid of codes.
"""

import hashlib
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class VideoTokenizer(nn.Module):
    """Pixels <-> codes. Pixels are always uint8, so that no range can be mistaken for another."""

    vocab_size: int
    stride: tuple[int, int, int]
    """Pixels of one code along (t, h, w)."""
    levels: tuple[int, ...] | None
    """Values of each digit of a code, lowest first; None if codes are rows of a codebook."""

    @abstractmethod
    def codes_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The grid of codes of such a clip; ValueError if the tokenizer cannot take it."""

    @abstractmethod
    def encode(self, pixels_BTHWC: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> codes, int64 (B, t, h, w)."""

    @abstractmethod
    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Codes -> uint8 (B, T, H, W, 3)."""

    @abstractmethod
    def codebook(self) -> Tensor | None:
        """Vectors of a learned codebook, (vocab_size, C); None if codes are made of digits."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that decides the codes: architecture and weights."""


def hash_module(module: nn.Module, config: dict[str, Any]) -> str:
    """sha256 over a module's configuration and the names, types, shapes and bytes of its weights, in name order."""
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def to_float(pixels_BTHWC: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1].

    Raises:
        ValueError: for any other type.
    """
    if pixels_BTHWC.dtype != torch.uint8:
        raise ValueError(f"pixels are {pixels_BTHWC.dtype}, expected uint8")
    return pixels_BTHWC.float() / 127.5 - 1


def to_uint8(video_BTHWC: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8; what lies outside is clipped."""
    return ((video_BTHWC.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
