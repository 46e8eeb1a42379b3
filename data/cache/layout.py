"""Layout of a cache's codes: grid, codes per place, vocabularies and type.

Legend: t h w the grid of places, G codes of a place, N places.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_MAX_CODES = 2**24
"""Most codes of a clip, 64 MB. They are held in memory."""
_MAX_DIGITS = 32
"""Most digits of a code. A product of many factors would take long."""

Levels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CodeLayout:
    """Shape and vocabularies of the codes of a clip.

    `grid`: places along (t, h, w); `vocab_size`: codes are below this number; `codes_per_place`: G; `levels`: for each code of
    a place, the number of values of each of its digits, lowest digit first (FSQ, LFQ), or None if codes are rows of codebooks.

    Raises ValueError if a number is out of range, or levels do not fit the vocabulary.
    """

    grid: tuple[int, int, int]
    vocab_size: int
    codes_per_place: int = 1
    levels: Levels | None = None

    def __post_init__(self) -> None:
        counts = (*self.grid, self.codes_per_place, self.vocab_size)
        if not all(0 < n < 2**32 for n in counts) or math.prod(self.grid) * self.codes_per_place > _MAX_CODES:
            numbers = f"codes_per_place {self.codes_per_place} or vocab_size {self.vocab_size}"
            raise ValueError(f"invalid codes_shape {self.grid}, {numbers}")
        if self.levels is None:
            return
        if len(self.levels) != self.codes_per_place:
            raise ValueError(f"levels must be given for {self.codes_per_place} codes per place, got {len(self.levels)}")
        if any(len(digits) > _MAX_DIGITS or min(digits, default=1) < 2 for digits in self.levels):
            raise ValueError(f"a code must have at most {_MAX_DIGITS} levels of at least 2")
        if max(map(math.prod, self.levels)) != self.vocab_size:
            raise ValueError(f"levels must be at least 2 and their largest product vocab_size {self.vocab_size}")

    @classmethod
    def of(cls, preimage: Mapping[str, Any]) -> "CodeLayout":
        """Return the layout from a specification in JSON, in which levels of a single code per place are not nested."""
        t, h, w = preimage["codes_shape"]
        groups, levels = preimage.get("codes_per_place", 1), preimage["levels"]
        if levels is not None:
            levels = tuple(map(tuple, levels)) if "codes_per_place" in preimage else (tuple(levels),)
        return cls((t, h, w), preimage["vocab_size"], groups, levels)

    def to_json(self) -> dict[str, Any]:
        """Return the part of a specification that `of` reads. It is that of older caches if there is one code per place."""
        shared = {"codes_shape": self.grid, "vocab_size": self.vocab_size}
        if self.codes_per_place == 1:
            return {**shared, "levels": None if self.levels is None else self.levels[0]}
        return {**shared, "levels": self.levels, "codes_per_place": self.codes_per_place}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes of a clip: (t, h, w), or (t, h, w, G) with several codes per place."""
        return (*self.grid, self.codes_per_place) if self.codes_per_place > 1 else self.grid

    @property
    def dtype(self) -> np.dtype:
        """Type of stored codes: little-endian uint16, or uint32 if uint16 is too small for the vocabulary."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def clip_bytes(self) -> int:
        """Bytes of the codes of a clip."""
        return self.dtype.itemsize * math.prod(self.shape)

    @cached_property
    def vocabularies(self) -> tuple[int, ...]:
        """Vocabulary size of each code of a place."""
        return (self.vocab_size,) * self.codes_per_place if self.levels is None else tuple(map(math.prod, self.levels))

    def outside(self, codes: np.ndarray) -> str | None:
        """Return a text if a code is outside its vocabulary, else None. The last axes of `codes` are those of `shape`."""
        # The usual case, in one pass over the codes.
        if not codes.size or (codes.max() < min(self.vocabularies) and (codes.dtype.kind == "u" or codes.min() >= 0)):
            return None
        codes_NG = codes.reshape(-1, self.codes_per_place)
        for size, low, high in zip(self.vocabularies, codes_NG.min(0).tolist(), codes_NG.max(0).tolist(), strict=True):
            if low < 0 or high >= size:
                return f"codes must be in 0..{size - 1}, got {low}..{high}"
        return None

    def numbered(self, codes: np.ndarray) -> np.ndarray:
        """Return codes as numbers below sum(vocabularies): the vocabularies of a place follow one another, (...) int64."""
        sizes_G = np.array(self.vocabularies)
        first_G = np.cumsum(sizes_G) - sizes_G
        return codes.astype(np.int64) + (first_G if self.codes_per_place > 1 else 0)


def valid_slices(frames_B: np.ndarray, frames: int, slices: int) -> np.ndarray:
    """Return the number of time slices of codes with valid frames, (B,). Later slices contain only padding.

    Args:
        frames_B: number of valid frames of each clip, from 1 to `frames`.
        frames: number of frames of a clip.
        slices: number of places along time of a clip.
    """
    if _causal(frames, slices):
        return 1 + -(-(frames_B - 1) * (slices - 1) // max(1, frames - 1))
    return -(-frames_B * slices // frames)


def _causal(frames: int, slices: int) -> bool:
    """Return whether the tokenizer is causal: one slice for the first frame, and one slice per 2^n further frames."""
    if frames % slices:
        return True
    stride, rest = divmod(frames - 1, max(1, slices - 1))
    return slices > 1 and rest == 0 and stride.bit_count() == 1
