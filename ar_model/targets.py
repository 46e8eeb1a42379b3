"""Prediction heads with their losses, for codes and for pixels.

Legend: B batch, L tokens, F frames and S pixels per frame of a tubelet, P codes or pixels of one token, C colour channels,
N = B * L * P codes, V vocabulary, D width, d digits.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar_model.cross_entropy import linear_cross_entropy
from ar_model.inputs import CodeSpec, CodeTable, Grid, Patching, digits_of
from ar_model.transformer import init_weights

CodeLikelihood = Literal["auto", "joint", "digits"]


def likelihood_of(codes: CodeSpec, likelihood: CodeLikelihood) -> CodeLikelihood:
    """Return what a setting means for these codes: `auto` is `digits` or `joint`.

    Raises a ValueError if the likelihood is unknown, or is `digits` for codes that are not made of digits.
    """
    if likelihood not in get_args(CodeLikelihood):
        raise ValueError(f"likelihood must be auto, joint or digits, got {likelihood!r}")
    if likelihood == "digits" and codes.levels is None:
        raise ValueError("likelihood digits needs codes made of digits (FSQ or LFQ), got rows of a codebook")
    if likelihood == "auto":
        return "digits" if codes.codes_per_place > 1 and codes.levels is not None else "joint"
    return likelihood


class CodeTarget(nn.Module):
    """Cross-entropy of codes given a decoder's output.

    `joint`: one softmax over the vocabulary. Its output vectors are composed from the geometry of the codes (all codes with the
    same digit share the vector of that digit) plus one free row per code.
    `digits`: one softmax per digit, which assumes that digits are independent given the context. It is a normalised likelihood
    too, and the only affordable one for large vocabularies.
    `auto`: `digits` for several codes per place that are made of digits, else `joint`.

    Args:
        places_per_token: places of one token; each code of each place gets its own projection of the decoder's output.
        table: embedding table of the same width, which `joint` then uses as its output vectors.

    Raises a ValueError as `likelihood_of`.
    """

    def __init__(
        self,
        codes: CodeSpec,
        width: int,
        places_per_token: int = 1,
        likelihood: CodeLikelihood = "auto",
        table: CodeTable | None = None,
    ) -> None:
        super().__init__()
        likelihood = likelihood_of(codes, likelihood)
        self.vocabularies = codes.vocabularies
        self.codes_per_token = places_per_token * codes.codes_per_place
        self.levels = codes.levels if likelihood == "digits" else None
        self.split = nn.Linear(width, self.codes_per_token * width)
        init_weights(self.split)
        if likelihood == "joint":
            if table is None:
                self.table = CodeTable(codes, width, free_rows=True)
            # The tuple hides a shared table from nn.Module: its weights are saved once, with the embedding.
            self._shared_table = () if table is None else (table,)
            self.bias = nn.Parameter(torch.zeros(sum(codes.vocabularies)))
        else:
            self.digits = nn.Linear(width, sum(map(sum, codes.levels or ())))
            # Small weights: the initial prediction is close to the uniform distribution.
            nn.init.normal_(self.digits.weight, std=0.02)
            nn.init.zeros_(self.digits.bias)
        self.scale = width**-0.5

    def forward(self, h_BLD: Tensor, codes_BLP: Tensor, share_BL: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of a code in nats, a scalar in fp32. `share_BL`: weights of tokens, which sum to 1."""
        groups = len(self.vocabularies)
        h_BLPD = self.split(h_BLD).unflatten(-1, (self.codes_per_token, -1))
        places = self.codes_per_token // groups
        share_N = None if share_BL is None else (share_BL / places).repeat_interleave(places)
        nats = self._joint if self.levels is None else self._digits
        # Code p of a token is code p % groups of its place.
        parts = [(h_BLPD[:, :, g::groups].flatten(0, 2), codes_BLP[..., g::groups].flatten()) for g in range(groups)]
        return torch.stack(nats(parts, share_N)).mean()

    def _joint(self, parts: Sequence[tuple[Tensor, Tensor]], share_N: Tensor | None) -> list[Tensor]:
        """Return the mean nats of each code of a place, with one softmax per code."""
        table = self._shared_table[0] if self._shared_table else self.table
        rows = (table.matrix() * self.scale).split(self.vocabularies)
        biases = self.bias.split(self.vocabularies)
        return [
            linear_cross_entropy(h_ND, rows_VD, bias_V, codes_N, share_N)
            for (h_ND, codes_N), rows_VD, bias_V in zip(parts, rows, biases, strict=True)
        ]

    def _digits(self, parts: Sequence[tuple[Tensor, Tensor]], share_N: Tensor | None) -> list[Tensor]:
        """Return the mean nats of each code of a place, with one softmax per digit."""
        assert self.levels is not None
        sizes = list(map(sum, self.levels))
        heads = zip(self.digits.weight.split(sizes), self.digits.bias.split(sizes), strict=True)
        nats = []
        for (h_ND, codes_N), (weight, bias), levels in zip(parts, heads, self.levels, strict=True):
            digits_Nd = digits_of(codes_N, levels)
            logits_per_digit = F.linear(h_ND, weight, bias).split(levels, dim=-1)
            of_digits = [_nats(logits, digits_Nd[:, i], share_N) for i, logits in enumerate(logits_per_digit)]
            nats.append(torch.stack(of_digits).sum())
        return nats

    def numbers(self, loss: Tensor, _: Tensor) -> dict[str, Tensor]:
        """Return further numbers to log: the loss in bits."""
        return {"bits_per_code": loss / math.log(2)}


def _nats(logits: Tensor, target: Tensor, share_N: Tensor | None) -> Tensor:
    nats_N = F.cross_entropy(logits.float(), target, reduction="none")
    return nats_N.mean() if share_N is None else (nats_N * share_N).sum()


class PixelTarget(nn.Module):
    """Mean squared error of a tubelet's pixels, normalised by the mean and standard deviation of each channel of each tubelet.

    The normalisation is VideoMAE's (arXiv 2203.12602 and its code: unbiased standard deviation plus 1e-6, of pixels in [0, 1]).
    The ARVideo paper (arXiv 2405.15160) does not state whether its targets are normalised.

    Raises a ValueError for tubelets of one pixel, which have no standard deviation.
    """

    def __init__(self, width: int, tubelet: Grid) -> None:
        super().__init__()
        if math.prod(tubelet) < 2:
            raise ValueError("a tubelet of one pixel cannot be normalised: use a larger objective.code_patch")
        self.head = nn.Linear(width, 3 * math.prod(tubelet))
        init_weights(self.head)

    def forward(self, h_BLD: Tensor, pixels_BLPC: Tensor) -> Tensor:
        """Return the mean squared error, a scalar in fp32, for pixels in 0..255 or differences of such pixels."""
        return F.mse_loss(self.head(h_BLD).float(), _normalised(pixels_BLPC).flatten(2))

    def numbers(self, _: Tensor, pixels_BLPC: Tensor) -> dict[str, Tensor]:
        """Return further numbers to log: in evaluation, `pixel_baseline`, the loss of predicting the mean of each tubelet.

        It is below 1 because constant channels of tubelets, as in black bars and unmoved background, have the target 0.
        """
        return {} if self.training else {"pixel_baseline": _normalised(pixels_BLPC).square().mean()}


def _normalised(pixels_BLPC: Tensor) -> Tensor:
    pixels_BLPC = pixels_BLPC.float() / 255
    std, mean = torch.std_mean(pixels_BLPC, dim=2, keepdim=True)
    return (pixels_BLPC - mean) / (std + 1e-6)


Difference = Literal["within", "next"]


def rgb_difference(pixels_BLPC: Tensor, slices: int, frames: int, difference: Difference) -> Tensor:
    """Return RGB differences of all tubelets in raster order, of `slices` time slices and `frames` frames per tubelet.

    `within`: each frame of a tubelet minus the frame before, (B, L, P - S, C). `next`: the next tubelet in time minus the
    tubelet, (B, L, P, C); the last time slice repeats the differences of the slice before.
    """
    pixels = pixels_BLPC.float()
    if difference == "within":
        return pixels.unflatten(2, (frames, -1)).diff(dim=2).flatten(2, 3)
    steps = pixels.unflatten(1, (slices, -1)).diff(dim=1)
    return torch.cat([steps, steps[:, -1:]], dim=1).flatten(1, 2)


Target = CodeTarget | PixelTarget


def make_target(patching: Patching, codes: CodeSpec, width: int, likelihood: CodeLikelihood) -> Target:
    """Return the head and loss for the tokens of a patching, given a decoder's width."""
    if patching.content == "pixels":
        return PixelTarget(width, patching.box)
    return CodeTarget(codes, width, math.prod(patching.box), likelihood)
