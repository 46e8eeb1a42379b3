"""What every tokenizer is to the rest of the house.

Legend: B clips, T H W C frames, height, width, colours; t h w the grid of codes.
"""

import hashlib
from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenizer.streaming import PIECE, decode_stream, encode_stream, evaluating

T = TypeVar("T", bound="VideoTokenizer")
_WHOLE = (torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64)


class VideoTokenizer(nn.Module):
    """Pixels <-> codes. Pixels are always uint8, so that no range can be mistaken for another.

    A tokenizer of a kind sets the attributes below and the four methods that are abstract here.
    """

    name: str
    """What it is, in a word: `vq3d-2x8x8-fsq1000`, `taming-f16-1024`."""
    vocab_size: int
    stride: tuple[int, int, int]
    """Pixels of one code along (t, h, w)."""
    causal: bool = False
    """Whether the first frame has codes of its own, which depend on nothing else: clips then have 1 + k * stride frames."""
    levels: tuple[int, ...] | None = None
    """Values of each digit of a code, lowest first; None if codes are rows of a codebook."""
    context: tuple[int, int] | None = None
    """How many codes before and after it, in time, anything of a code depends on; None: all of them."""
    _frozen: bool = False

    def freeze(self: T) -> T:
        """Evaluation mode and no gradients, for good: `train`, its own or that of a module that holds it, has no effect."""
        self.eval().requires_grad_(False)
        self._frozen = True
        return self

    def train(self: T, mode: bool = True) -> T:
        return super().train(mode and not self._frozen)

    def codes_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The grid of codes of such a clip.

        Raises:
            ValueError: if the stride does not divide it; it says which sizes would do.
        """
        t, h, w = self.stride
        wrong = [
            text
            for text in (
                _misfit("frames", frames, t, int(self.causal)),
                _misfit("height", height, h, 0),
                _misfit("width", width, w, 0),
            )
            if text
        ]
        if wrong:
            raise ValueError(
                f"a clip of {frames} frames of {height}x{width} does not fit {self.name}: {'; '.join(wrong)}"
            )
        return -(-frames // t), height // h, width // w

    def frames_of(self, codes: int) -> int:
        """Frames of a clip that has that many codes along time."""
        return 1 + (codes - 1) * self.stride[0] if self.causal else codes * self.stride[0]

    def frames_that_fit(self, frames: int) -> int:
        """The shortest clip of at least that many frames that it can take."""
        lead = int(self.causal)
        return lead - (lead - frames) // self.stride[0] * self.stride[0]

    @torch.no_grad()
    def encode(self, pixels_BTHWC: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> codes, int64 (B, t, h, w); a long clip goes through piece by piece (streaming.py).

        In evaluation mode, whatever the tokenizer is in: nothing of it changes.

        Raises:
            ValueError: for pixels that are not uint8, or a size that it cannot take.
        """
        self.check_pixels(pixels_BTHWC)
        codes, _, _ = self.codes_shape(*pixels_BTHWC.shape[1:4])
        if self.context is not None and codes > PIECE:
            return torch.cat(list(encode_stream(self, pixels_BTHWC.split(PIECE * self.stride[0], 1))), 1)
        with evaluating(self):
            return self.encode_piece(pixels_BTHWC)

    @torch.no_grad()
    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Codes (B, t, h, w) -> uint8 (B, T, H, W, 3); in evaluation mode, as `encode`.

        Raises:
            ValueError: for codes that are not whole numbers of the vocabulary, or none.
        """
        codes_Bthw = self.checked_codes(codes_Bthw)
        if 0 in codes_Bthw.shape[1:]:
            raise ValueError(f"codes of shape {tuple(codes_Bthw.shape)} are no clip")
        if self.context is not None and codes_Bthw.shape[1] > PIECE:
            return torch.cat(list(decode_stream(self, codes_Bthw.split(PIECE, 1))), 1)
        with evaluating(self):
            return self.decode_piece(codes_Bthw)

    def check_pixels(self, pixels_BTHWC: Tensor) -> None:
        """Raises ValueError for anything but uint8 (B, T, H, W, 3)."""
        if pixels_BTHWC.dtype != torch.uint8:
            raise ValueError(f"pixels are {pixels_BTHWC.dtype}, expected uint8")
        if pixels_BTHWC.ndim != 5 or pixels_BTHWC.shape[-1] != 3:
            raise ValueError(f"pixels of shape {tuple(pixels_BTHWC.shape)}, expected (clips, frames, height, width, 3)")

    def checked_codes(self, codes_Bthw: Tensor) -> Tensor:
        """Codes of any whole-number type as int64.

        Raises:
            ValueError: for codes that are not whole numbers of the vocabulary.
        """
        if codes_Bthw.ndim != 4 or codes_Bthw.dtype not in _WHOLE:
            raise ValueError(
                f"codes are {codes_Bthw.dtype} of shape {tuple(codes_Bthw.shape)}, expected whole numbers (clips, t, h, w)"
            )
        codes_Bthw = codes_Bthw.long()  # first: a uint8 is compared with 1000 as with 1000 % 256
        if codes_Bthw.numel():
            low, high = codes_Bthw.aminmax()
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"codes from {int(low)} to {int(high)} are not of {self.name}, which has {self.vocab_size}"
                )
        return codes_Bthw

    @abstractmethod
    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        """`encode` in one pass, of pixels that were found to be right."""

    @abstractmethod
    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        """`decode` in one pass, of codes that were found to be right."""

    @abstractmethod
    def codebook(self) -> Tensor | None:
        """Vectors of a learned codebook, (vocab_size, C); None if codes are made of digits."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that decides the codes: architecture and weights."""


def _misfit(what: str, size: int, stride: int, lead: int) -> str:
    """What is wrong with a size that has to be `lead` + a multiple of the stride, and which sizes would do."""
    if size >= max(1, lead) and (size - lead) % stride == 0:
        return ""
    below = lead + max(0, (size - lead) // stride) * stride
    fits = [str(good) for good in (below, below + stride) if good >= 1]
    return f"{what} must be {'1 + ' if lead else ''}a multiple of {stride} ({' or '.join(fits)} would do)"


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
    return pixels_BTHWC.float().div_(127.5).sub_(1)


def to_uint8(video_BTHWC: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8; what lies outside is clipped."""
    return ((video_BTHWC.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
