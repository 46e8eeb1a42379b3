"""Videos of any length through a tokenizer, a piece at a time, in memory that does not grow with them.

A code depends on so many codes before and after it (`context`) and on no others, so a piece that is encoded together with
its context has the codes that it has in the whole video. The first frame of a causal clip, alone in its codes, is no such
piece; where one starts inside a video, that frame is one more that is thrown away.

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

PIECE = 32
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
    """Frames, uint8 (B, any number, H, W, 3), to codes, int64 (B, 32, h, w); the last are what is left, at most a context more.

    Raises:
        ValueError: for frames that the tokenizer cannot take; for their number once they have come to an end.
    """
    _, right = _context(tokenizer)
    held_BTHWC: Tensor | None = None
    dropped = given = 0
    for piece_BTHWC in pieces:
        tokenizer.check_pixels(piece_BTHWC)
        tokenizer.codes_shape(tokenizer.frames_of(1), *piece_BTHWC.shape[2:4])
        held_BTHWC = _joined(held_BTHWC, piece_BTHWC)
        while dropped + held_BTHWC.shape[1] >= tokenizer.frames_of(given + PIECE + right):
            start = _start(tokenizer, given)
            stop = tokenizer.frames_of(given + PIECE + right) - dropped
            with evaluating(tokenizer):
                codes_Bthw = tokenizer.encode_piece(held_BTHWC[:, start * tokenizer.stride[0] - dropped : stop])
            yield codes_Bthw[:, given - start : given - start + PIECE]
            given += PIECE
            needed = _start(tokenizer, given) * tokenizer.stride[0]
            held_BTHWC, dropped = held_BTHWC[:, needed - dropped :].clone(), needed
    if held_BTHWC is not None:
        total, _, _ = tokenizer.codes_shape(dropped + held_BTHWC.shape[1], *held_BTHWC.shape[2:4])
        if total > given:
            start = _start(tokenizer, given)
            with evaluating(tokenizer):
                codes_Bthw = tokenizer.encode_piece(held_BTHWC[:, start * tokenizer.stride[0] - dropped :])
            yield codes_Bthw[:, given - start :]


@torch.no_grad()
def decode_stream(tokenizer: VideoTokenizer, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Codes, whole numbers (B, any number, h, w), to frames, uint8 (B, T, H, W, 3).

    Raises:
        ValueError: for codes that are not of the vocabulary.
    """
    _, right = _context(tokenizer)
    held_Bthw: Tensor | None = None
    dropped = given = 0

    def frames(codes_Bthw: Tensor, count: int) -> Tensor:
        before = given - dropped
        with evaluating(tokenizer):
            video_BTHWC = tokenizer.decode_piece(codes_Bthw)
        return video_BTHWC[:, tokenizer.frames_of(before) if before else 0 : tokenizer.frames_of(before + count)]

    for piece_Bthw in pieces:
        held_Bthw = _joined(held_Bthw, tokenizer.checked_codes(piece_Bthw))
        while dropped + held_Bthw.shape[1] >= given + PIECE + right:
            yield frames(held_Bthw[:, : given + PIECE + right - dropped], PIECE)
            given += PIECE
            needed = _start(tokenizer, given)
            held_Bthw, dropped = held_Bthw[:, needed - dropped :].clone(), needed
    if held_Bthw is not None and dropped + held_Bthw.shape[1] > given:
        yield frames(held_Bthw, dropped + held_Bthw.shape[1] - given)


def _joined(held: Tensor | None, piece: Tensor) -> Tensor:
    if held is None:
        return piece
    if len(held) != len(piece) or held.shape[2:] != piece.shape[2:]:
        raise ValueError(f"pieces of shape {tuple(held.shape)} and {tuple(piece.shape)} are not of the same videos")
    return torch.cat([held, piece], 1)


def _context(tokenizer: VideoTokenizer) -> tuple[int, int]:
    if tokenizer.context is None:
        raise ValueError(f"{tokenizer.name}: a code may depend on the whole clip, so it cannot be made piece by piece")
    return tokenizer.context


def _start(tokenizer: VideoTokenizer, code: int) -> int:
    """The first code of the piece that gives this one as the whole video does."""
    left, _ = _context(tokenizer)
    return max(0, code - left - int(tokenizer.causal))
