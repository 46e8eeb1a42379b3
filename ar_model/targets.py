"""What is predicted, and at what cost: a head and its loss.

Legend: B batch, L predicted tokens, P codes or pixels of one token, C colours, V codes of the vocabulary, D width.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar_model.cross_entropy import linear_cross_entropy
from ar_model.inputs import CodeSpec, CodeTable, Grid, Patching, digits_of

CodeLikelihood = Literal["joint", "digits"]


class CodeTarget(nn.Module):
    """Negative log-likelihood of codes given a decoder's output.

    `joint`: one softmax over the vocabulary, whose output vectors are composed by geometry (a digit's vector is shared
    by all codes that have it) plus one free row per code. `digits`: one softmax per digit, as if digits were
    independent given the context; an honest likelihood too, and the only affordable one for large vocabularies.

    `table`: output vectors of `joint` that are shared with an embedding of the same width.

    Raises:
        ValueError: for `digits` of codes that have none.
    """

    def __init__(
        self,
        codes: CodeSpec,
        width: int,
        codes_per_token: int = 1,
        likelihood: CodeLikelihood = "joint",
        table: CodeTable | None = None,
    ) -> None:
        super().__init__()
        if likelihood not in get_args(CodeLikelihood):
            raise ValueError(f"likelihood {likelihood!r} is neither joint nor digits")
        if likelihood == "digits" and codes.levels is None:
            raise ValueError("likelihood digits needs codes made of digits (FSQ or LFQ); these are rows of a codebook")
        self.codes_per_token = codes_per_token
        self.levels = codes.levels if likelihood == "digits" else None
        self.split = nn.Linear(width, codes_per_token * width)
        nn.init.xavier_uniform_(self.split.weight)
        nn.init.zeros_(self.split.bias)
        if likelihood == "joint":
            if table is None:
                self.table = CodeTable(codes, width, free_rows=True)
            self._shared = () if table is None else (table,)  # in a tuple: weights have one owner, and are saved once
            self.bias = nn.Parameter(torch.zeros(codes.vocab_size))
        else:
            self.digits = nn.Linear(width, sum(codes.levels or ()))
            nn.init.normal_(self.digits.weight, std=0.02)  # the first guess is about the uniform distribution
            nn.init.zeros_(self.digits.bias)
        self.scale = width**-0.5

    def forward(self, h_BLD: Tensor, codes_BLP: Tensor, share_BL: Tensor | None = None) -> Tensor:
        """Mean nats of a code, a scalar in fp32; `share_BL`: what each token counts in the mean, in all 1."""
        share_N = (
            None if share_BL is None else (share_BL / self.codes_per_token).repeat_interleave(self.codes_per_token)
        )
        h_BLPD = self.split(h_BLD).unflatten(-1, (self.codes_per_token, -1))
        if self.levels is None:
            (table,) = self._shared or (self.table,)
            rows_VD = table.matrix() * self.scale
            return linear_cross_entropy(h_BLPD.flatten(0, 2), rows_VD, self.bias, codes_BLP.flatten(), share_N)
        digits_BLPn = digits_of(codes_BLP, self.levels)
        heads = self.digits(h_BLPD).split(self.levels, dim=-1)
        costs = [_nats(logits, digits_BLPn[..., i], share_N) for i, logits in enumerate(heads)]
        return torch.stack(costs).sum()

    @staticmethod
    def numbers(loss: Tensor) -> dict[str, Tensor]:
        """What the loss says in other units."""
        return {"bits_per_code": loss / math.log(2)}


def _nats(logits: Tensor, target: Tensor, share_N: Tensor | None) -> Tensor:
    nats_N = F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none")
    return nats_N.mean() if share_N is None else (nats_N * share_N).sum()


class PixelTarget(nn.Module):
    """Squared error of a tubelet's pixels, each colour of each tubelet normalised by its mean and deviation.

    As VideoMAE does (arXiv 2203.12602, its code: unbiased deviation plus 1e-6, of pixels in [0, 1]). ARVideo does not say whether
    it normalises (arXiv 2405.15160).

    Raises:
        ValueError: for tubelets of one pixel, which have no deviation.
    """

    def __init__(self, width: int, tubelet: Grid) -> None:
        super().__init__()
        if math.prod(tubelet) < 2:
            raise ValueError("a token of one pixel leaves nothing to predict beside its mean: use a larger code_patch")
        self.head = nn.Linear(width, 3 * math.prod(tubelet))
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, h_BLD: Tensor, pixels_BLPC: Tensor) -> Tensor:
        """Mean squared error, a scalar in fp32, of pixels in 0..255 or what is made of them."""
        wanted_BLPC = pixels_BLPC.float() / 255
        deviation, mean = torch.std_mean(wanted_BLPC, dim=2, keepdim=True)
        wanted_BLPC = (wanted_BLPC - mean) / (deviation + 1e-6)
        return F.mse_loss(self.head(h_BLD).float(), wanted_BLPC.flatten(2))

    @staticmethod
    def numbers(loss: Tensor) -> dict[str, Tensor]:
        return {}


Difference = Literal["within", "next"]


def rgb_difference(pixels_BLPC: Tensor, slices: int, frames: int, difference: Difference) -> Tensor:
    """RGB differences of all tubelets in raster order: `within` one, of each of its frames to the next (B, L, P', C); `next`, to
    the tubelet that follows in time, of the last ones to the one before (B, L, P, C)."""
    pixels = pixels_BLPC.float()
    if difference == "within":
        frames_BLFSC = pixels.unflatten(2, (frames, -1))
        return frames_BLFSC.diff(dim=2).flatten(2, 3)
    times_BTSPC = pixels.unflatten(1, (slices, -1))
    steps = times_BTSPC.diff(dim=1)
    return torch.cat([steps, steps[:, -1:]], dim=1).flatten(1, 2)


def make_target(cut: Patching, codes: CodeSpec, width: int, likelihood: CodeLikelihood) -> CodeTarget | PixelTarget:
    """Head and loss for tokens cut so, behind a decoder of a width."""
    if cut.content == "pixels":
        return PixelTarget(width, cut.box)
    return CodeTarget(codes, width, math.prod(cut.box), likelihood)
