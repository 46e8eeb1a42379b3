"""Linear tokenizer: principal components of blocks of pixels, each rounded to a few levels. It is fitted in closed form.

Legend: B clips, T H W C frames, height, width, colours; t h w the grid of places, G codes of a place; N blocks, P values of a
block, D components, L levels of a component.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from tokenizer.base import VideoTokenizer, check_pixels, hash_module
from tokenizer.levels import centres_and_thresholds, levels_of
from tokenizer.model_card import model_card

_NAME = re.compile(r"linear-([1-9]\d?)x([1-9]\d?)x([1-9]\d?)-(?:([1-9]\d?)x)?([1-9]\d{0,4})", re.ASCII)
DEFAULT = "linear-2x8x8-4x1000"
MOST_CODES, LARGEST = 64, 2**16
"""Most codes of a place, and the largest vocabulary of a code."""
_SCALE = 2**24
"""Weights are integers, multiples of 1 / 2^24. Sums of products with pixels stay below 2^53, so float64 computes them exactly."""
_MOST_BLOCKS, _MOST_VALUES = 2**16, 2**25
"""Most blocks to which a tokenizer is fitted, and most values of all of them (256 MiB)."""


class Linear(VideoTokenizer, PyTorchModelHubMixin, library_name="arvideo"):
    """Principal components of blocks of pixels, each rounded to a few levels; several components make one code.

    Encoding is a matrix product in exact arithmetic: a code depends only on the pixels of its block, not on the batch, the device
    or the number of threads. `fit` computes the weights; before, they are empty.

    Args:
        name: stride along (t, h, w), codes per place (default one) and largest vocabulary of a code, for example
            linear-2x8x8-4x1000.
        digits: levels of each component, for each code of a place, as `fit` has chosen them.

    Raises:
        ValueError: if the name is invalid, or the levels do not fit it.
    """

    levels: tuple[tuple[int, ...], ...]

    def __init__(self, *, name: str = DEFAULT, digits: Sequence[Sequence[int]] = ()) -> None:
        super().__init__()
        self.stride, self.codes_per_place, self._limit = _parse_name(name)
        self.name, self.context = name, (0, 0)
        self.levels = tuple(tuple(levels) for levels in digits)
        if self.levels and len(self.levels) != self.codes_per_place:
            raise ValueError(f"{name}: digits must be given for {self.codes_per_place} codes, got {len(self.levels)}")
        if any(not levels or min(levels) < 2 or math.prod(levels) > self._limit for levels in self.levels):
            raise ValueError(f"{name}: digits {self.levels} must be at least 2, with products up to {self._limit}")
        self.vocab_size = max(map(math.prod, self.levels), default=0)
        values, flat = 3 * math.prod(self.stride), [level for levels in self.levels for level in levels]
        if len(flat) > values:
            raise ValueError(f"{name}: a block of {values} values cannot have {len(flat)} components")
        widest = max(flat, default=2)
        self.weight_PD = nn.Buffer(torch.zeros(values, len(flat), dtype=torch.int32))
        self.threshold_DL = nn.Buffer(torch.zeros(len(flat), widest - 1, dtype=torch.int64))
        self.centre_DL = nn.Buffer(torch.zeros(len(flat), widest))
        self.basis_DP = nn.Buffer(torch.zeros(len(flat), values))
        self.mean_P = nn.Buffer(torch.zeros(values))

    @classmethod
    def fit(cls, name: str, clips_BTHWC: Tensor) -> "Linear":
        """Fit a tokenizer to clips, uint8 (B, T, H, W, 3). The result depends only on the arguments.

        All codes have the same numbers of levels, and the thresholds of a component are the quantiles of a normal distribution.
        Levels that minimise the squared error of the pixels have a PSNR that is 5 dB higher, but features that are learned from
        their codes are worse (docs/lab_notes.md).

        Raises:
            ValueError: if the name is invalid, clips do not fit the stride, or blocks vary in fewer directions than a place has
                codes, as those of a black video.
        """
        empty = cls(name=name)
        check_pixels(clips_BTHWC)
        empty.codes_shape(*clips_BTHWC.shape[1:4])
        codes, levels = empty.codes_per_place, levels_of(empty._limit)
        blocks_NP = _some(_blocks(clips_BTHWC, empty.stride).flatten(0, 3)).double()
        basis_DP = _principal_components(blocks_NP, codes * len(levels))
        if (varying := len(basis_DP)) < codes:
            problem = f"the blocks vary in {varying} directions, fewer than the {codes} codes of a place"
            raise ValueError(f"{name}: {problem}; give clips with more motion and texture, or choose fewer codes")
        # The components are dealt to the codes in turn, so that each code gets some of a large variance.
        dealt = [list(range(code, varying, codes)) for code in range(codes)]
        fitted = cls(name=name, digits=[levels[: len(own)] for own in dealt])
        fitted._set(blocks_NP, basis_DP[[component for own in dealt for component in own]])
        return fitted.freeze()

    def _set(self, blocks_NP: Tensor, basis_DP: Tensor) -> None:
        """Set the weights from blocks and the components of all digits."""
        mean_P, weight_PD = blocks_NP.mean(0), (basis_DP.T * _SCALE).round()
        self.basis_DP.copy_(basis_DP)
        self.mean_P.copy_(mean_P)
        self.weight_PD.copy_(weight_PD)
        self.threshold_DL.fill_(torch.iinfo(torch.int64).max)
        all_levels = [count for code in self.levels for count in code]
        for row, (values_N, count) in enumerate(zip((blocks_NP @ weight_PD).T.contiguous(), all_levels, strict=True)):
            centres_L, thresholds_L = centres_and_thresholds(values_N, count)
            self.threshold_DL[row, : count - 1] = thresholds_L.ceil().long()
            self.centre_DL[row, :count] = (centres_L - mean_P @ weight_PD[:, row]) / _SCALE

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        self._check_fitted()
        blocks_BthwP = _blocks(pixels_BTHWC, self.stride)
        # MPS has no float64.
        device = torch.device("cpu") if pixels_BTHWC.device.type == "mps" else pixels_BTHWC.device
        blocks_NP = blocks_BthwP.flatten(0, 3).to(device, torch.float64)
        # On a CPU, this order of the factors is three times as fast as the other one.
        values_DN = self.weight_PD.T.to(device, torch.float64) @ blocks_NP.T
        # A level is the number of thresholds that a value reaches.
        digits_ND = torch.searchsorted(self.threshold_DL.to(device, torch.float64), values_DN, right=True).T
        return self._codes(digits_ND).unflatten(0, blocks_BthwP.shape[:4]).to(pixels_BTHWC.device)

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        self._check_fitted()
        grid = codes_Bthw.shape[:4]
        digits_ND = self._digits(codes_Bthw.reshape(-1, self.codes_per_place))
        with torch.autocast(codes_Bthw.device.type, enabled=False):
            centres_ND = self.centre_DL.gather(1, digits_ND.T).T
            blocks_NP = centres_ND @ self.basis_DP + self.mean_P
        pixels = blocks_NP.round().clamp(0, 255).to(torch.uint8).unflatten(0, grid)
        p, q, r = self.stride
        return rearrange(pixels, "b t h w (p q r c) -> b (t p) (h q) (w r) c", p=p, q=q, r=r)

    def codebook(self) -> None:
        """Return None: codes are made of digits."""

    def fingerprint(self) -> str:
        return hash_module(self, {"class": type(self).__name__, "name": self.name, "levels": list(self.levels)})

    def generate_model_card(self, training: Mapping[str, object] | None = None) -> ModelCard:  # type: ignore[override]
        """Return README.md of `save_pretrained`. `training`: facts of the fit by name, given as `model_card_kwargs`."""
        return model_card(self, training or {})

    def _check_fitted(self) -> None:
        if not self.levels:
            raise ValueError(f"{self.name} has not been fitted; call Linear.fit")

    def _codes(self, digits_ND: Tensor) -> Tensor:
        """Return codes (N,) or (N, G) from the digits of all components, lowest digit first."""
        codes = []
        for part_ND, levels in zip(digits_ND.split(list(map(len, self.levels)), 1), self.levels, strict=True):
            radix_D = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=digits_ND.device)
            codes.append((part_ND * radix_D).sum(1))
        return torch.stack(codes, 1) if self.codes_per_place > 1 else codes[0]

    def _digits(self, codes_NG: Tensor) -> Tensor:
        """Invert `_codes`, (N, G) -> (N, D)."""
        digits = []
        for codes_N, levels in zip(codes_NG.unbind(1), self.levels, strict=True):
            for level in levels:
                digits.append(codes_N % level)
                codes_N = codes_N // level
        return torch.stack(digits, 1)


def _parse_name(name: str) -> tuple[tuple[int, int, int], int, int]:
    """Return stride, codes per place and largest vocabulary of a name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"invalid tokenizer name {name!r}: expected linear-TxHxW-[Gx]V, for example {DEFAULT}")
    t, h, w, groups, limit = (int(number or 1) for number in match.groups())
    if max(t, h, w) > 32 or groups > MOST_CODES or not 2 <= limit <= LARGEST:
        allowed = f"strides up to 32, up to {MOST_CODES} codes per place, and vocabularies from 2 to {LARGEST}"
        raise ValueError(f"{name}: must have {allowed}")
    if groups > (values := 3 * t * h * w):
        raise ValueError(f"{name}: {groups} codes per place are more than the {values} values of a block")
    return (t, h, w), groups, limit


def _blocks(pixels_BTHWC: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Return the pixels of each block, (B, t, h, w, P)."""
    p, q, r = stride
    return rearrange(pixels_BTHWC, "b (t p) (h q) (w r) c -> b t h w (p q r c)", p=p, q=q, r=r)


def _some(blocks_NP: Tensor) -> Tensor:
    """Return a random subset of blocks, always the same, that fits into memory."""
    most = min(_MOST_BLOCKS, _MOST_VALUES // blocks_NP.shape[1])
    order_N = torch.randperm(len(blocks_NP), generator=torch.Generator().manual_seed(0))
    return blocks_NP[order_N[:most]]


def _principal_components(blocks_NP: Tensor, most: int) -> Tensor:
    """Return up to `most` directions in which blocks vary, (D, P), in the order of their variance."""
    from sklearn.decomposition import PCA  # takes a second to import

    # The shares of the variance, which are not used, are undefined for blocks that do not vary.
    with np.errstate(invalid="ignore"):
        components = PCA(min(*blocks_NP.shape, most), random_state=0).fit(blocks_NP.numpy())
    # Directions in which blocks of whole grey levels do not vary have the variance of rounding errors.
    return torch.from_numpy(components.components_[components.explained_variance_ > 1e-6])
