"""Input layers: embeddings of a tokenizer's codes, or of tubelets of pixels.

Legend: B batch, T H W the grid of places or pixels, G codes of a place, L tokens, M some of them, P codes or pixels of one token,
C colour channels (of a codebook: its dimensions), V vocabulary (with several codes per place, their vocabularies one after the
other), D width. Codes of a token are numbered place by place, so code p is code p % G of its place.
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
Levels = tuple[tuple[int, ...], ...]
_MOST_CODES = 2**24
"""Most codes of a clip."""


class CodeSpec:
    """Description of a cache's codes. It is not a dataclass, because the hub mixin would serialise a dataclass with its codebook.

    Args:
        shape: places of a clip along (t, h, w).
        vocab_size: codes are 0..vocab_size - 1.
        codes_per_place: G. Codes have a last axis G if it is above 1.
        levels: for FSQ and LFQ, the number of values of each digit of each code of a place, lowest digit first; the largest
            product is vocab_size.
        codebook_VC: for learned codebooks, their vectors.
        clip: frames, height and width of the clips in pixels. None if the cache holds no pixels.

    `vocabularies` is the vocabulary size of each code of a place.

    Raises a ValueError if levels or codebook do not fit the vocabulary, or a number is out of range.
    """

    def __init__(
        self,
        *,
        shape: Grid,
        vocab_size: int,
        codes_per_place: int = 1,
        levels: Levels | None = None,
        codebook_VC: Tensor | None = None,
        clip: Grid | None = None,
    ) -> None:
        numbers = (*shape, codes_per_place, vocab_size)
        if min(numbers) < 1 or prod(numbers[:-1]) > _MOST_CODES or vocab_size >= 2**32:
            given = f"{codes_per_place} codes per place, or vocab_size {vocab_size}"
            raise ValueError(f"invalid shape {shape} of at most {_MOST_CODES} codes, {given}")
        if levels is not None:
            _check_levels(levels, codes_per_place, vocab_size)
        self.vocabularies = (vocab_size,) * codes_per_place if levels is None else tuple(map(prod, levels))
        if codebook_VC is not None and len(codebook_VC) != sum(self.vocabularies):
            expected = f"{codes_per_place} times vocab_size {vocab_size}"
            raise ValueError(f"the codebook must have {expected} vectors, got {len(codebook_VC)}")
        self.shape, self.clip, self.codes_per_place = shape, clip, codes_per_place
        self.vocab_size, self.levels, self.codebook_VC = vocab_size, levels, codebook_VC

    def to_json(self) -> dict:
        """Return the JSON form. It holds only the shape of a codebook; the vectors are saved with the model's weights.

        With one code per place, it is that of models from before there could be several.
        """
        several, levels = self.codes_per_place > 1, self.levels
        data = {"shape": self.shape, "vocab_size": self.vocab_size, "clip": self.clip}
        data["levels"] = levels if several or levels is None else levels[0]
        data["codebook_shape"] = None if self.codebook_VC is None else list(self.codebook_VC.shape)
        return {**data, "codes_per_place": self.codes_per_place} if several else data

    @classmethod
    def from_json(cls, data: dict) -> "CodeSpec":
        clip, levels, codes_per_place = data.get("clip"), data["levels"], data.get("codes_per_place", 1)
        if levels is not None:
            levels = tuple(map(tuple, levels)) if codes_per_place > 1 else (tuple(levels),)
        return cls(
            shape=tuple(data["shape"]),
            vocab_size=data["vocab_size"],
            codes_per_place=codes_per_place,
            levels=levels,
            codebook_VC=None if data["codebook_shape"] is None else torch.zeros(data["codebook_shape"]),
            clip=None if clip is None else tuple(clip),
        )


def _check_levels(levels: Levels, codes_per_place: int, vocab_size: int) -> None:
    if len(levels) != codes_per_place:
        raise ValueError(f"levels must be given for {codes_per_place} codes per place, got {len(levels)}")
    for digits in levels:
        if min(digits, default=0) < 2 or len(digits) > 32:
            got = f"{len(digits)} from {min(digits, default=0)}"
            raise ValueError(f"a code must have at most 32 levels of at least 2, got {got}")
    if (largest := max(map(prod, levels))) != vocab_size:
        raise ValueError(f"the largest product of levels {levels} must be vocab_size {vocab_size}, got {largest}")


class CodeTable(nn.Module):
    """Embedding table of codes, (V, D), composed from the geometry of the codes.

    The vector of a code made of digits is the sum of one learned vector per digit value. For a codebook, it is a learned
    projection of the codebook's vector. Otherwise, or if `by_geometry` is false, each code has a learned row. `free_rows` adds a
    learned row, initially zero, in the first two cases too.
    """

    def __init__(self, codes: CodeSpec, width: int, *, by_geometry: bool = True, free_rows: bool = False) -> None:
        super().__init__()
        self.vocabularies, size = codes.vocabularies, sum(codes.vocabularies)
        self.first_G = nn.Buffer(torch.tensor([0, *accumulate(codes.vocabularies[:-1])]), persistent=False)
        self.digits: nn.Parameter | None = None
        self.projection: nn.Linear | None = None
        self.rows: nn.Parameter | None = None
        self.levels = codes.levels if by_geometry else None
        if self.levels is not None:
            scales = [0.5 / len(levels) ** 0.5 for levels in self.levels for _ in range(sum(levels))]
            self.digits = nn.Parameter(torch.randn(len(scales), width) * torch.tensor(scales)[:, None])
        elif by_geometry and codes.codebook_VC is not None:
            vectors_VC = codes.codebook_VC.float()
            self.codebook_VC = nn.Buffer(vectors_VC / vectors_VC.std().clamp_min(1e-6))
            self.projection = nn.Linear(vectors_VC.shape[1], width, bias=False)
        if self.digits is None and self.projection is None:
            self.rows = nn.Parameter(torch.randn(size, width) * 0.5)
        elif free_rows:
            self.rows = nn.Parameter(torch.zeros(size, width))

    def matrix(self) -> Tensor:
        """Return the vectors of all codes, (V, D)."""
        parts: list[Tensor] = [] if self.rows is None else [self.rows]
        if self.digits is not None:
            parts.append(
                self._from_digits([torch.arange(size, device=self.digits.device) for size in self.vocabularies])
            )
        if self.projection is not None:
            parts.append(self.projection(self.codebook_VC))
        return torch.stack(parts).sum(0)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the vectors of the codes of tokens, (..., P) -> (..., P, D)."""
        groups = len(self.vocabularies)
        if self.rows is None and self.projection is None and codes.numel() < sum(self.vocabularies):
            # The matrix of a large vocabulary would cost more than the vectors of the codes of a batch.
            of_group = [codes[..., g::groups] for g in range(groups)]
            vectors = self._from_digits([part.flatten() for part in of_group]).view(groups, *of_group[0].shape, -1)
            return rearrange(vectors, "g ... p d -> ... (p g) d")
        if groups > 1:
            codes = codes + self.first_G.repeat(codes.shape[-1] // groups)
        return F.embedding(codes, self.matrix())

    def _from_digits(self, codes: Sequence[Tensor]) -> Tensor:
        """Return the sums of the vectors of the digits of codes, given for each code of a place, one after the other."""
        assert self.digits is not None and self.levels is not None
        sums, first = [], 0
        for codes_N, levels in zip(codes, self.levels, strict=True):
            first_row_P = torch.tensor([0, *accumulate(levels[:-1])], device=codes_N.device) + first
            sums.append(F.embedding_bag(digits_of(codes_N, levels) + first_row_P, self.digits, mode="sum"))
            first += sum(levels)
        return torch.cat(sums)


def digits_of(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Return the mixed-radix digits of codes, (...) -> (..., digits), lowest digit first as in FSQ (arXiv 2309.15505)."""
    digits = []
    for n in levels:
        digits.append(codes % n)
        codes = codes // n
    return torch.stack(digits, dim=-1)


@dataclass(frozen=True)
class Patching:
    """Division of a clip into tokens: boxes of `box` codes, or tubelets of `box` pixels, along (t, h, w)."""

    content: Content
    box: Grid

    @classmethod
    def of(cls, content: Content, codes: CodeSpec, code_patch: Grid) -> "Patching":
        """Return the patching into tokens of `code_patch` codes, or into tubelets with the same grid of tokens.

        Raises a ValueError if the patches do not divide the codes or pixels, or if the cache holds no pixels.
        """
        patching = cls("codes", code_patch)
        grid = patching.grid(codes.shape)
        if content == "codes":
            return patching
        if codes.clip is None:
            raise ValueError("the objective needs pixels; the cache has none: tokenize with --keep_pixels jpeg or raw")
        (frames, height, width), (t, h, w) = codes.clip, grid
        if frames % t or height % h or width % w:
            raise ValueError(f"the token grid {grid} does not divide the clip {codes.clip} (frames, height, width)")
        return cls("pixels", (frames // t, height // h, width // w))

    def grid(self, shape: Sequence[int]) -> Grid:
        """Return the numbers of tokens along (t, h, w) in a clip of `shape`. Raises a ValueError if boxes do not divide it."""
        (t, h, w), (pt, ph, pw) = shape, self.box
        if min(self.box) < 1 or t % pt or h % ph or w % pw:
            raise ValueError(f"objective.code_patch: {self.box} {self.content} do not divide a clip of {tuple(shape)}")
        return t // pt, h // ph, w // pw

    def clip(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the codes (B, T, H, W) or (B, T, H, W, G), or pixels (B, T, H, W, C), of a batch."""
        return batch["codes_BTHW"] if self.content == "codes" else batch["pixels_BTHWC"]

    def tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the codes (B, L, P) or pixels (B, L, P, C) of all tokens in raster order."""
        pt, ph, pw = self.box
        pattern = "b (t pt) (h ph) (w pw) ... -> b (t h w) (pt ph pw) ..."
        content = rearrange(self.clip(batch), pattern, pt=pt, ph=ph, pw=pw)
        return content.flatten(2) if self.content == "codes" else content


def take(content_BLP: Tensor, tokens_BM: Tensor) -> Tensor:
    """Gather the content of some tokens, (B, L, ...) -> (B, M, ...)."""
    sample_B1 = torch.arange(len(tokens_BM), device=tokens_BM.device)[:, None]
    return content_BLP[sample_B1, tokens_BM]


class CodeEmbedding(nn.Module):
    """Embedding of tokens of P codes, (B, L, P) -> (B, L, D). If P > 1, a linear layer merges the vectors of the codes."""

    def __init__(self, codes: CodeSpec, width: int, places_per_token: int = 1, *, by_geometry: bool = True) -> None:
        super().__init__()
        self.table = CodeTable(codes, width, by_geometry=by_geometry)
        codes_per_token = places_per_token * codes.codes_per_place
        self.merge = nn.Linear(codes_per_token * width, width) if codes_per_token > 1 else None

    def forward(self, codes_BLP: Tensor) -> Tensor:
        x_BLE = self.table(codes_BLP).flatten(2)
        return x_BLE if self.merge is None else self.merge(x_BLE)


class TubeletEmbedding(nn.Module):
    """Linear embedding of tubelets of RGB pixels, uint8 (B, L, P, C) -> (B, L, D), as in VideoMAE (arXiv 2203.12602).

    Pixels are normalised by ImageNet's statistics. The linear layer equals the 3-D convolution of section 3.2.
    """

    def __init__(self, width: int, tubelet: Grid) -> None:
        super().__init__()
        self.mean_C = nn.Buffer(255 * torch.tensor([0.485, 0.456, 0.406]), persistent=False)
        self.std_C = nn.Buffer(255 * torch.tensor([0.229, 0.224, 0.225]), persistent=False)
        self.projection = nn.Linear(3 * prod(tubelet), width)

    def forward(self, pixels_BLPC: Tensor) -> Tensor:
        return self.projection(((pixels_BLPC - self.mean_C) / self.std_C).flatten(2))


def make_input(patching: Patching, codes: CodeSpec, width: int, code_input: CodeInput) -> nn.Module:
    """Return the CodeEmbedding or TubeletEmbedding for the tokens of a patching."""
    if patching.content == "pixels":
        return TubeletEmbedding(width, patching.box)
    return CodeEmbedding(codes, width, prod(patching.box), by_geometry=code_input == "geometry")
