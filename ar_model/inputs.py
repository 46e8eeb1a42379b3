"""What goes in: codes of a tokenizer, embedded by what they mean, or tubelets of pixels.

Legend: B batch, T H W the grid of codes or pixels, L tokens, P codes or pixels of one token, C colours, V codes of the
vocabulary, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Content = Literal["codes", "pixels"]
CodeInput = Literal["geometry", "rows"]
Grid = tuple[int, int, int]


class CodeSpec:
    """What a cache says of its codes. (No dataclass: the hub mixin would turn it into a dictionary, codebook and all.)

    Args:
        shape: codes of a clip along (t, h, w).
        vocab_size: codes are 0..vocab_size - 1.
        levels: for FSQ and LFQ, the values that each digit can take, lowest digit first; their product is vocab_size.
        codebook_VC: for a learned codebook, its vectors.
        clip: frames, height and width of the clips behind the codes, where their pixels are at hand.

    Raises:
        ValueError: if levels or codebook do not fit the vocabulary.
    """

    def __init__(
        self,
        *,
        shape: Grid,
        vocab_size: int,
        levels: tuple[int, ...] | None = None,
        codebook_VC: Tensor | None = None,
        clip: Grid | None = None,
    ) -> None:
        if levels is not None and prod(levels) != vocab_size:
            raise ValueError(f"levels {levels} do not multiply to {vocab_size} codes")
        if codebook_VC is not None and len(codebook_VC) != vocab_size:
            raise ValueError(f"a codebook of {len(codebook_VC)} vectors does not fit {vocab_size} codes")
        self.shape, self.vocab_size, self.levels, self.codebook_VC = shape, vocab_size, levels, codebook_VC
        self.clip = clip

    def to_json(self) -> dict:
        """JSON form; of a codebook it holds the shape only, its values are in the weights."""
        codebook = None if self.codebook_VC is None else list(self.codebook_VC.shape)
        return {
            "shape": self.shape,
            "vocab_size": self.vocab_size,
            "levels": self.levels,
            "codebook_shape": codebook,
            "clip": self.clip,
        }

    @classmethod
    def from_json(cls, data: dict) -> "CodeSpec":
        levels, codebook, clip = data["levels"], data["codebook_shape"], data.get("clip")
        return cls(
            shape=tuple(data["shape"]),
            vocab_size=data["vocab_size"],
            levels=None if levels is None else tuple(levels),
            codebook_VC=None if codebook is None else torch.zeros(codebook),
            clip=None if clip is None else tuple(clip),
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


@dataclass(frozen=True)
class Patching:
    """How a clip is cut into tokens: boxes of `box` codes, or tubelets of `box` pixels."""

    content: Content
    box: Grid

    @classmethod
    def of(cls, content: Content, codes: CodeSpec, code_patch: Grid) -> "Patching":
        """Tokens of `code_patch` codes; of pixels those that the same tokens stand for.

        Raises:
            ValueError: if the codes, or the clips' pixels, are not cut evenly; if pixels are wanted of codes without them.
        """
        cut = cls("codes", code_patch)
        grid = cut.grid(codes.shape)
        if content == "codes":
            return cut
        if codes.clip is None:
            raise ValueError("pixels are wanted, but the cache holds none; make it with --keep_pixels jpeg or raw")
        if any(pixels % tokens for pixels, tokens in zip(codes.clip, grid, strict=True)):
            raise ValueError(f"clips of {codes.clip} pixels are not cut evenly into {grid} tokens")
        frames, rows, columns = (pixels // tokens for pixels, tokens in zip(codes.clip, grid, strict=True))
        return cls("pixels", (frames, rows, columns))

    def grid(self, shape: Sequence[int]) -> Grid:
        """Tokens of a clip along (t, h, w); raises a ValueError if the boxes do not divide it."""
        (t, h, w), (pt, ph, pw) = shape, self.box
        if min(self.box) < 1 or t % pt or h % ph or w % pw:
            raise ValueError(f"tokens of {self.box} {self.content} do not divide a clip of {tuple(shape)} (code_patch)")
        return t // pt, h // ph, w // pw

    def clip(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Codes (B, T, H, W) or pixels (B, T, H, W, C) of a batch."""
        return batch["codes_BTHW"] if self.content == "codes" else batch["pixels_BTHWC"]

    def tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Codes (B, L, P) or pixels (B, L, P, C) of all tokens."""
        pt, ph, pw = self.box
        pattern = "b (t pt) (h ph) (w pw) ... -> b (t h w) (pt ph pw) ..."
        return rearrange(self.clip(batch), pattern, pt=pt, ph=ph, pw=pw)


def take(content_BLP: Tensor, tokens_BM: Tensor) -> Tensor:
    """The content (B, L, ...) of some tokens, (B, M, ...)."""
    sample_B1 = torch.arange(len(tokens_BM), device=tokens_BM.device)[:, None]
    return content_BLP[sample_B1, tokens_BM]


class CodeEmbedding(nn.Module):
    """Codes of a token (B, L, P) -> (B, L, D): vectors side by side through a linear layer (none for a single code)."""

    def __init__(self, codes: CodeSpec, width: int, codes_per_token: int = 1, *, by_geometry: bool = True) -> None:
        super().__init__()
        self.table = CodeTable(codes, width, by_geometry=by_geometry)
        self.merge = nn.Linear(codes_per_token * width, width) if codes_per_token > 1 else None

    def forward(self, codes_BLP: Tensor) -> Tensor:
        x_BLE = self.table(codes_BLP).flatten(2)
        return x_BLE if self.merge is None else self.merge(x_BLE)


class TubeletEmbedding(nn.Module):
    """uint8 pixels of a token (B, L, P, C) -> (B, L, D): normalised by ImageNet's mean and deviation, as VideoMAE's are, and
    through a linear layer (arXiv 2203.12602, section 3.2: a convolution whose stride is its size)."""

    def __init__(self, width: int, tubelet: Grid) -> None:
        super().__init__()
        self.mean_C: Tensor
        self.deviation_C: Tensor
        self.register_buffer("mean_C", 255 * torch.tensor([0.485, 0.456, 0.406]), persistent=False)
        self.register_buffer("deviation_C", 255 * torch.tensor([0.229, 0.224, 0.225]), persistent=False)
        self.projection = nn.Linear(3 * prod(tubelet), width)

    def forward(self, pixels_BLPC: Tensor) -> Tensor:
        x_BLPC = (pixels_BLPC - self.mean_C) / self.deviation_C
        return self.projection(x_BLPC.flatten(2))


def make_input(cut: Patching, codes: CodeSpec, width: int, code_input: CodeInput) -> CodeEmbedding | TubeletEmbedding:
    """The first layer for tokens cut so."""
    if cut.content == "pixels":
        return TubeletEmbedding(width, cut.box)
    return CodeEmbedding(codes, width, prod(cut.box), by_geometry=code_input == "geometry")
