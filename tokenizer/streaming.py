"""Helpers for the streaming methods of `VideoTokenizer`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put all submodules in evaluation mode; on exit, restore the mode of each."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Buffer:
    """Most recent part of a stream of tensors (B, T, ...). Positions along T count from the start of the stream."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._start = 0
        self.stop = 0
        """Length of the stream so far, including the dropped part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a piece without its time axis, (B, ...); empty before the first piece."""
        return (len(self._pieces[0]), *self._pieces[0].shape[2:]) if self._pieces else ()

    def append(self, piece: Tensor) -> None:
        """Append a piece.

        Raises:
            ValueError: if its shape without the time axis differs from that of the previous pieces.
        """
        if self._pieces and (len(piece), *piece.shape[2:]) != self.shape:
            shapes = f"{tuple(self._pieces[-1].shape)} and {tuple(piece.shape)}"
            raise ValueError(f"pieces of shape {shapes} cannot be parts of the same videos")
        self._pieces.append(piece)
        self.stop += piece.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        """Return positions `start` to `stop`, excluding `stop`."""
        # Pieces are joined here and not in `append`, so that they are copied once per forward pass, not once per piece.
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, 1)]
        return self._pieces[0][:, start - self._start : stop - self._start]

    def drop_before(self, start: int) -> None:
        """Free everything before position `start`."""
        self._pieces = [self.read(start, self.stop).clone()]
        self._start = start
