"""Base class of all tokenizers.

Legend: B clips, T H W C frames, height, width, colours; t h w the grid of places, G codes of a place. With one code per
place, codes have no axis G.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenizer.streaming import Buffer, evaluating

PIECE = 16
"""Number of places along time that one forward pass computes for a long video, not counting their context."""

T = TypeVar("T", bound="VideoTokenizer")
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64)


class VideoTokenizer(nn.Module):
    """Encoder of pixels to codes and decoder of codes to pixels. Pixels are always uint8, so their range is unambiguous.

    A subclass sets the attributes below and implements the abstract methods.
    """

    name: str
    """Short name, for example `vq3d-2x8x8-fsq1000` or `taming-f16-1024`."""
    vocab_size: int
    """Codes are below this number. Each code of a place may have a smaller vocabulary, see `vocabularies`."""
    codes_per_place: int = 1
    stride: tuple[int, int, int]
    """Pixels per place along (t, h, w)."""
    causal: bool = False
    """True if the first frame has its own codes, which depend on no other frame. Clips then have 1 + k * stride frames."""
    levels: tuple[tuple[int, ...], ...] | None = None
    """For each code of a place, the number of values of each of its digits, lowest digit first; None if codes are indices into
    codebooks."""
    context: tuple[int, int] | None = None
    """Number of places along time, before and after a code, on which it depends; None if it may depend on the whole clip."""
    _frozen: bool = False

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """Vocabulary size of each code of a place. Raises ValueError if `levels` is not nested."""
        if self.levels is None:
            return (self.vocab_size,) * self.codes_per_place
        if not all(isinstance(levels, Sequence) for levels in self.levels):
            raise ValueError(f"{self.name}: levels must have one tuple for each code of a place, got {self.levels}")
        return tuple(math.prod(levels) for levels in self.levels)

    def freeze(self: T) -> T:
        """Set evaluation mode and disable gradients. Later calls of `train` have no effect, also those by a parent."""
        self.eval().requires_grad_(False)
        self._frozen = True
        return self

    def train(self: T, mode: bool = True) -> T:
        return super().train(mode and not self._frozen)

    def codes_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the grid (t, h, w) of the places of a clip.

        Raises:
            ValueError: if a size does not fit the stride; the message names the nearest valid sizes.
        """
        t, h, w = self.stride
        sizes = [("frames", frames, t, int(self.causal)), ("height", height, h, 0), ("width", width, w, 0)]
        reasons = "; ".join(filter(None, (_misfit(*size) for size in sizes)))
        if reasons:
            raise ValueError(f"a clip of {frames} frames of {height}x{width} does not fit {self.name}: {reasons}")
        return -(-frames // t), height // h, width // w

    def frames_of(self, codes: int) -> int:
        """Return the number of frames of a clip with this many codes along time."""
        return 1 + (codes - 1) * self.stride[0] if self.causal else codes * self.stride[0]

    def frames_that_fit(self, frames: int) -> int:
        """Return the smallest valid clip length of at least `frames`."""
        lead = int(self.causal)
        return lead - (lead - frames) // self.stride[0] * self.stride[0]

    @torch.no_grad()
    def encode(self, pixels_BTHWC: Tensor) -> Tensor:
        """Encode pixels, uint8 (B, T, H, W, 3), to codes, int64 (B, t, h, w) or (B, t, h, w, G).

        Long clips are encoded by `encode_stream`.

        The network runs in evaluation mode. Afterwards, the mode of each submodule is restored.

        Raises:
            ValueError: if pixels are not uint8, or a size does not fit the stride.
        """
        check_pixels(pixels_BTHWC)
        places, _, _ = self.codes_shape(*pixels_BTHWC.shape[1:4])
        if self.context is not None and places > PIECE:
            return torch.cat(list(self.encode_stream(pixels_BTHWC.split(PIECE * self.stride[0], 1))), 1)
        with evaluating(self):
            return self.encode_piece(pixels_BTHWC)

    @torch.no_grad()
    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Decode integer codes, as from `encode`, to pixels, uint8 (B, T, H, W, 3). Long clips are decoded by `decode_stream`.

        The network runs in evaluation mode. Afterwards, the mode of each submodule is restored.

        Raises:
            ValueError: if codes are not integers within their vocabularies, or the grid is empty.
        """
        codes_Bthw = self.checked_codes(codes_Bthw)
        if 0 in codes_Bthw.shape[1:]:
            raise ValueError(f"cannot decode an empty grid: codes have shape {tuple(codes_Bthw.shape)}")
        if self.context is not None and codes_Bthw.shape[1] > PIECE:
            return torch.cat(list(self.decode_stream(codes_Bthw.split(PIECE, 1))), 1)
        with evaluating(self):
            return self.decode_piece(codes_Bthw)

    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a video of any length with constant memory.

        A code depends only on its own frames and those of its `context`. A piece that is encoded together with its
        context therefore has the same codes as in one pass over the whole video.

        Args:
            pieces: consecutive pieces, uint8 (B, any number of frames, H, W, 3).

        Yields:
            Codes, int64 (B, PIECE, h, w) or (B, PIECE, h, w, G). The last tensor has the remaining codes, of fewer than
            PIECE + right context places along time.

        Raises:
            ValueError: if pixels are invalid, if the total number of frames does not fit the stride (raised after the
                last piece), or if a code may depend on the whole clip.
        """
        done, buffer = 0, Buffer()
        _, right = self._checked_context()
        for piece_BTHWC in pieces:
            check_pixels(piece_BTHWC)
            self.codes_shape(self.frames_of(1), *piece_BTHWC.shape[2:4])
            buffer.append(piece_BTHWC)
            while buffer.stop >= self.frames_of(done + PIECE + right):
                yield self._encode_part(buffer, done, self.frames_of(done + PIECE + right))[:, :PIECE]
                done += PIECE
                buffer.drop_before(self._pass_start(done) * self.stride[0])
        if buffer.shape:
            total, _, _ = self.codes_shape(buffer.stop, *buffer.shape[1:3])
            if total > done:
                yield self._encode_part(buffer, done, buffer.stop)

    @torch.no_grad()
    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode consecutive pieces of codes, (B, any number, h, w) or (B, any number, h, w, G), with constant memory.

        Pixels equal those of one pass over all codes, except for rare rounding differences of one grey level.

        Yields:
            Frames, uint8 (B, T, H, W, 3).

        Raises:
            ValueError: if codes are not integers within their vocabularies, or if a code may depend on the whole clip.
        """
        done, buffer = 0, Buffer()
        _, right = self._checked_context()
        for piece_Bthw in pieces:
            buffer.append(self.checked_codes(piece_Bthw))
            while buffer.stop >= done + PIECE + right:
                yield self._decode_part(buffer, done, done + PIECE, done + PIECE + right)
                done += PIECE
                buffer.drop_before(self._pass_start(done))
        if buffer.stop > done:
            yield self._decode_part(buffer, done, buffer.stop, buffer.stop)

    def _encode_part(self, buffer: Buffer, start: int, read_stop: int) -> Tensor:
        """Return the codes from `start` on, encoded from their context and the frames up to `read_stop`."""
        pass_start = self._pass_start(start)
        with evaluating(self):
            return self.encode_piece(buffer.read(pass_start * self.stride[0], read_stop))[:, start - pass_start :]

    def _decode_part(self, buffer: Buffer, start: int, stop: int, read_stop: int) -> Tensor:
        """Return the frames of codes `start` to `stop`, decoded from their context and the codes up to `read_stop`."""
        pass_start = self._pass_start(start)
        first = self.frames_of(start - pass_start) if start > pass_start else 0
        with evaluating(self):
            video_BTHWC = self.decode_piece(buffer.read(pass_start, read_stop))
        return video_BTHWC[:, first : self.frames_of(stop - pass_start)]

    def _checked_context(self) -> tuple[int, int]:
        if self.context is None:
            raise ValueError(f"{self.name} cannot be streamed: a code may depend on the whole clip")
        return self.context

    def _pass_start(self, code: int) -> int:
        """Return the code at which a pass must start so that `code` is the same as in one pass over the whole video.

        A causal pass starts one code earlier, because it encodes its first frame alone. That first code is discarded.
        """
        return max(0, code - self._checked_context()[0] - int(self.causal))

    def checked_codes(self, codes_Bthw: Tensor) -> Tensor:
        """Return codes of any integer type as int64.

        Raises:
            ValueError: if codes are not integers of shape (B, t, h, w), or (B, t, h, w, G) with several codes per place,
                within their vocabularies.
        """
        grouped = self.codes_per_place > 1
        fits = codes_Bthw.ndim == 4 + grouped and (not grouped or codes_Bthw.shape[-1] == self.codes_per_place)
        if not fits or codes_Bthw.dtype not in _INTEGERS:
            kind = f"{codes_Bthw.dtype} of shape {tuple(codes_Bthw.shape)}"
            expected = f"(clips, t, h, w, {self.codes_per_place})" if grouped else "(clips, t, h, w)"
            raise ValueError(f"codes are {kind}, expected integers {expected}")
        # Convert before comparing: with a uint8 tensor, the vocabulary size 1000 would become 1000 % 256.
        codes_Bthw = codes_Bthw.long()
        if codes_Bthw.numel():
            of_group = codes_Bthw.reshape(-1, self.codes_per_place)
            for size, low, high in zip(
                self.vocabularies, of_group.amin(0).tolist(), of_group.amax(0).tolist(), strict=True
            ):
                if low < 0 or high >= size:
                    raise ValueError(f"codes from {low} to {high} are out of range: {self.name} has {size} codes")
        return codes_Bthw

    @abstractmethod
    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        """Encode checked pixels in one pass."""

    @abstractmethod
    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        """Decode checked codes in one pass."""

    @abstractmethod
    def codebook(self) -> Tensor | None:
        """Return the vectors of learned codebooks, one codebook per code of a place after the other, (vocab_size * G, C).

        None if codebooks are not learned.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of everything that determines the codes: architecture and weights."""


def _misfit(name: str, size: int, stride: int, lead: int) -> str:
    """Return an error text with the nearest valid sizes; empty if the size is `lead` plus a multiple of the stride."""
    if size >= max(1, lead) and (size - lead) % stride == 0:
        return ""
    below = lead + max(0, (size - lead) // stride) * stride
    nearest = " or ".join(str(fit) for fit in (below, below + stride) if fit >= 1)
    return f"{name} must be {'1 + ' if lead else ''}a multiple of {stride} ({nearest} would do)"


def hash_module(module: nn.Module, config: dict[str, Any]) -> str:
    """Return the sha256 of a configuration and of the names, dtypes, shapes and bytes of all weights, sorted by name."""
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_pixels(pixels_BTHWC: Tensor) -> None:
    """Raise ValueError unless pixels are uint8 (B, T, H, W, 3)."""
    if pixels_BTHWC.dtype != torch.uint8:
        raise ValueError(f"pixels are {pixels_BTHWC.dtype}, expected uint8")
    if pixels_BTHWC.ndim != 5 or pixels_BTHWC.shape[-1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels_BTHWC.shape)}, expected (clips, frames, height, width, 3)")


def to_float(pixels_BTHWC: Tensor) -> Tensor:
    """Convert uint8 to float in [-1, 1].

    Raises:
        ValueError: if the dtype is not uint8.
    """
    if pixels_BTHWC.dtype != torch.uint8:
        raise ValueError(f"pixels are {pixels_BTHWC.dtype}, expected uint8")
    return pixels_BTHWC.float().div_(127.5).sub_(1)


def to_uint8(video_BTHWC: Tensor) -> Tensor:
    """Convert float in [-1, 1] to uint8; values out of range are clipped."""
    return ((video_BTHWC.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
