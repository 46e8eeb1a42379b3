"""Videos of any length through a tokenizer, a piece at a time, in memory that does not grow with them.

A code depends on so many codes before and after it (`context`) and on no others, so a piece that is encoded together with
its context has the codes that it has in the whole video (pixels too, but for a rounding here and there). The first frame of
a causal clip, alone in its codes, is no such piece; where one starts inside a video, that frame is one more that is thrown
away.

Legend: B videos, T H W frames, height, width, 3 colours; t h w the grid of codes; s frames of a code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizer.base import VideoTokenizer

PIECE = 16
"""Codes along time that are made at once, beside their context."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All parts in evaluation mode; afterwards each in its own again."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def encode_stream(tokenizer: VideoTokenizer, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames, uint8 (B, any number, H, W, 3), to codes, int64 (B, 16, h, w); the last are what is left, at most a context more.

    Raises:
        ValueError: for frames that the tokenizer cannot take; for their number once they have come to an end.
    """
    stride, given, held = tokenizer.stride[0], 0, _Held()
    _, right = _context(tokenizer)
    for piece_BTHWC in pieces:
        tokenizer.check_pixels(piece_BTHWC)
        tokenizer.codes_shape(tokenizer.frames_of(1), *piece_BTHWC.shape[2:4])
        held.add(piece_BTHWC)
        while held.stop >= tokenizer.frames_of(given + PIECE + right):
            start = _start(tokenizer, given)
            frames_BTHWC = held.part(start * stride, tokenizer.frames_of(given + PIECE + right))
            with evaluating(tokenizer):
                codes_Bthw = tokenizer.encode_piece(frames_BTHWC)
            yield codes_Bthw[:, given - start : given - start + PIECE]
            given += PIECE
            held.forget(_start(tokenizer, given) * stride)
    if held.shape:
        total, _, _ = tokenizer.codes_shape(held.stop, *held.shape[1:3])
        if total > given:
            start = _start(tokenizer, given)
            with evaluating(tokenizer):
                codes_Bthw = tokenizer.encode_piece(held.part(start * stride, held.stop))
            yield codes_Bthw[:, given - start :]


@torch.no_grad()
def decode_stream(tokenizer: VideoTokenizer, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Codes, whole numbers (B, any number, h, w), to frames, uint8 (B, T, H, W, 3).

    Raises:
        ValueError: for codes that are not of the vocabulary.
    """
    given, held = 0, _Held()
    _, right = _context(tokenizer)

    def frames(stop: int, new: int) -> Tensor:
        start = _start(tokenizer, given)
        with evaluating(tokenizer):
            video_BTHWC = tokenizer.decode_piece(held.part(start, stop))
        before = given - start
        return video_BTHWC[:, tokenizer.frames_of(before) if before else 0 : tokenizer.frames_of(before + new)]

    for piece_Bthw in pieces:
        held.add(tokenizer.checked_codes(piece_Bthw))
        while held.stop >= given + PIECE + right:
            yield frames(given + PIECE + right, PIECE)
            given += PIECE
            held.forget(_start(tokenizer, given))
    if held.stop > given:
        yield frames(held.stop, held.stop - given)


class _Held:
    """The end of what has come in, along time."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._dropped = 0
        self.stop = 0
        """How much has come in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a moment: videos, then what follows time; empty before anything has come in."""
        return tuple(size for axis, size in enumerate(self._parts[0].shape) if axis != 1) if self._parts else ()

    def add(self, piece: Tensor) -> None:
        if self._parts and (len(piece), *piece.shape[2:]) != self.shape:
            shapes = f"{tuple(self._parts[-1].shape)} and {tuple(piece.shape)}"
            raise ValueError(f"pieces of shape {shapes} are not of the same videos")
        self._parts.append(piece)
        self.stop += piece.shape[1]

    def part(self, start: int, stop: int) -> Tensor:
        """From one moment to another, counted from the beginning."""
        if len(self._parts) > 1:  # joined once a pass, not once a piece
            self._parts = [torch.cat(self._parts, 1)]
        return self._parts[0][:, start - self._dropped : stop - self._dropped]

    def forget(self, start: int) -> None:
        """All before a moment."""
        self._parts = [self.part(start, self.stop).clone()]
        self._dropped = start


def _context(tokenizer: VideoTokenizer) -> tuple[int, int]:
    if tokenizer.context is None:
        raise ValueError(f"{tokenizer.name}: a code may depend on the whole clip, so it cannot be made piece by piece")
    return tokenizer.context


def _start(tokenizer: VideoTokenizer, code: int) -> int:
    """The first code of the piece that gives this one as the whole video does."""
    left, _ = _context(tokenizer)
    return max(0, code - left - int(tokenizer.causal))
