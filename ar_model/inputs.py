"""What goes in: codes of a tokenizer, embedded by what they mean.

Legend: B batch, T H W the grid of codes, L tokens, P codes of one token, V codes of the vocabulary, D width.
"""

from itertools import accumulate
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CodeInput = Literal["geometry", "rows"]


class CodeSpec:
    """What a cache says of its codes. (No dataclass: the hub mixin would turn it into a dictionary, codebook and all.)

    Args:
        shape: codes of a clip along (t, h, w).
        vocab_size: codes are 0..vocab_size - 1.
        levels: for FSQ and LFQ, the values that each digit can take, lowest digit first; their product is vocab_size.
        codebook_VC: for a learned codebook, its vectors.

    Raises:
        ValueError: if levels or codebook do not fit the vocabulary.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        vocab_size: int,
        levels: tuple[int, ...] | None = None,
        codebook_VC: Tensor | None = None,
    ) -> None:
        if levels is not None and prod(levels) != vocab_size:
            raise ValueError(f"levels {levels} do not multiply to {vocab_size} codes")
        if codebook_VC is not None and len(codebook_VC) != vocab_size:
            raise ValueError(f"a codebook of {len(codebook_VC)} vectors does not fit {vocab_size} codes")
        self.shape, self.vocab_size, self.levels, self.codebook_VC = shape, vocab_size, levels, codebook_VC

    def to_json(self) -> dict:
        """JSON form; of a codebook it holds the shape only, its values are in the weights."""
        codebook = None if self.codebook_VC is None else list(self.codebook_VC.shape)
        return {"shape": self.shape, "vocab_size": self.vocab_size, "levels": self.levels, "codebook_shape": codebook}

    @classmethod
    def from_json(cls, data: dict) -> "CodeSpec":
        levels, codebook = data["levels"], data["codebook_shape"]
        return cls(
            shape=tuple(data["shape"]),
            vocab_size=data["vocab_size"],
            levels=None if levels is None else tuple(levels),
            codebook_VC=None if codebook is None else torch.zeros(codebook),
        )


class CodeTable(nn.Module):
    """One vector per code, composed from the code's geometry.

    Digits: the sum of one learned vector per digit value. Codebook: its vectors through a learned projection. Neither,
    or `by_geometry` false: one learned row per code. `free_rows` adds such rows, starting at zero, to the first two.
    """

    def __init__(self, codes: CodeSpec, width: int, *, by_geometry: bool = True, free_rows: bool = False) -> None:
        super().__init__()
        self.digit_rows_VP: Tensor
        self.codebook_VC: Tensor
        self.digits: nn.Parameter | None = None
        self.projection: nn.Linear | None = None
        self.rows: nn.Parameter | None = None
        if by_geometry and codes.levels is not None:
            self.digits = nn.Parameter(torch.randn(sum(codes.levels), width) * (0.5 / len(codes.levels) ** 0.5))
            first_row = torch.tensor([0, *accumulate(codes.levels[:-1])])
            rows_VP = digits_of(torch.arange(codes.vocab_size), codes.levels) + first_row
            self.register_buffer("digit_rows_VP", rows_VP, persistent=False)
        elif by_geometry and codes.codebook_VC is not None:
            vectors_VC = codes.codebook_VC.float()
            self.register_buffer("codebook_VC", vectors_VC / vectors_VC.std().clamp_min(1e-6))
            self.projection = nn.Linear(vectors_VC.shape[1], width, bias=False)
        if self.digits is None and self.projection is None:
            self.rows = nn.Parameter(torch.randn(codes.vocab_size, width) * 0.5)
        elif free_rows:
            self.rows = nn.Parameter(torch.zeros(codes.vocab_size, width))

    def matrix(self) -> Tensor:
        """All vectors, (V, D)."""
        parts: list[Tensor] = [] if self.rows is None else [self.rows]
        if self.digits is not None:
            parts.append(F.embedding_bag(self.digit_rows_VP, self.digits, mode="sum"))
        if self.projection is not None:
            parts.append(self.projection(self.codebook_VC))
        return torch.stack(parts).sum(0)

    def forward(self, codes: Tensor) -> Tensor:
        """Vectors of the codes, (...) -> (..., D)."""
        return F.embedding(codes, self.matrix())


def digits_of(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Mixed-radix digits of codes, (...) -> (..., digits), lowest first as FSQ numbers its codes (arXiv 2309.15505)."""
    digits = []
    for n in levels:
        digits.append(codes % n)
        codes = codes // n
    return torch.stack(digits, dim=-1)


def token_grid(codes: CodeSpec, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid of tokens when a box of `patch` codes makes one token.

    Raises:
        ValueError: if the box does not divide the codes.
    """
    (t, h, w), (pt, ph, pw) = codes.shape, patch
    if min(patch) < 1 or t % pt or h % ph or w % pw:
        raise ValueError(f"code_patch {patch} does not divide the {codes.shape} codes of a clip")
    return t // pt, h // ph, w // pw


def patch_codes(codes_BTHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Codes of every token, (B, L, P)."""
    pt, ph, pw = patch
    return rearrange(codes_BTHW, "b (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw)", pt=pt, ph=ph, pw=pw)


class CodeEmbedding(nn.Module):
    """Codes of a token (B, L, P) -> (B, L, D): vectors side by side through a linear layer (none for a single code)."""

    def __init__(self, codes: CodeSpec, width: int, codes_per_token: int = 1, *, by_geometry: bool = True) -> None:
        super().__init__()
        self.table = CodeTable(codes, width, by_geometry=by_geometry)
        self.merge = nn.Linear(codes_per_token * width, width) if codes_per_token > 1 else None

    def forward(self, codes_BLP: Tensor) -> Tensor:
        x_BLE = self.table(codes_BLP).flatten(2)
        return x_BLE if self.merge is None else self.merge(x_BLE)
