"""Quantizers of vector-quantize-pytorch with a common interface.

Each class takes its vocabulary size and, as keyword-only arguments, its options.

Legend: B samples, N vectors, C channels, V codes, G codes of a vector (in `Grouped`).
"""

import inspect
import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize

_PAIRS = 2**24
"""Largest number of (vector, code) pairs that are compared at once, to limit peak memory."""


class Quantizer(nn.Module):
    """Base class of all quantizers. `make_quantizer` checks their names and options; the constructors check the rest."""

    vocab_size: int
    codes_per_place: int = 1
    channels: int
    """Channels of each vector."""
    levels: tuple[tuple[int, ...], ...] | None = None
    """For each code of a vector, the number of values of each of its digits, lowest digit first; None if a code is an index into
    a codebook."""
    updated_in_forward: bool = False
    """True if the codebook is updated in each forward pass in training."""
    advice: str
    """Advice to the user if only a few codes are in use."""

    def forward(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantized vectors (B, N, C), codes int64 and the auxiliary loss (scalar), computed in fp32.

        Codes have shape (B, N), or (B, N, G) with several codes per vector.
        """
        with torch.autocast(z_BNC.device.type, enabled=False):
            quantized_BNC, codes_BN, loss = self.quantize(z_BNC.float())
        return quantized_BNC, codes_BN.long(), loss

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize fp32 vectors; `forward` calls this method with autocast disabled."""
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the quantized vectors of codes, (...) or (..., G) -> (..., C)."""
        return self.codebook()[codes]  # type: ignore[index]  # overridden where there is no codebook

    def codebook(self) -> Tensor | None:
        """Return the vectors of a learned codebook, (V, C), or of G codebooks, (G * V, C); None if they are not learned."""
        return None


class FSQQuantizer(Quantizer):
    """FSQ (arXiv 2309.15505): each channel is rounded to a few levels. It has no state to synchronise between processes.

    FSQ can collapse by saturation: where the tanh before rounding is flat, the gradient is zero and a channel stays there.
    The `spread` loss pulls the channels of a batch towards mean 0, standard deviation 1 and no correlation, which keeps
    them out of the flat part of the tanh.

    Args:
        levels: number of values of each digit; default: table 1 of the paper for this vocabulary.
        spread: weight of the spread loss.
        preserve_symmetry: make levels symmetric around 0 (arXiv 2411.19842).
        noise_dropout: fraction of values that get noise of at most +-0.5 after rounding, in training only, as in
            vector-quantize-pytorch; needs preserve_symmetry.
    """

    TABLE = {
        240: (8, 6, 5),
        1000: (8, 5, 5, 5),
        4375: (7, 5, 5, 5, 5),
        15360: (8, 8, 8, 6, 5),
        64000: (8, 8, 8, 5, 5, 5),
    }
    advice = "raise the quantizer's spread (--model.options '{spread: 0.05}') or lower --lr"

    def __init__(
        self,
        vocab_size: int,
        *,
        levels: tuple[int, ...] | None = None,
        spread: float = 0.01,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if levels is None and vocab_size not in self.TABLE:
            sizes = ", ".join(map(str, self.TABLE))
            raise ValueError(f"fsq{vocab_size}: FSQ has levels for {sizes}; set `levels` for other sizes")
        chosen = tuple(self.TABLE[vocab_size] if levels is None else levels)
        if math.prod(chosen) != vocab_size or not all(3 <= n <= 1000 for n in chosen):
            raise ValueError(f"levels {chosen} must be from 3 to 1000 each and multiply to {vocab_size}")
        if noise_dropout and not preserve_symmetry:
            raise ValueError(f"fsq{vocab_size}: noise_dropout needs preserve_symmetry")
        if noise_dropout > 1:
            raise ValueError(f"fsq{vocab_size}: noise_dropout {noise_dropout} must be at most 1")
        # The constructor computes with its tensors, which is not possible on the meta device.
        with torch.device("cpu"):
            self.fsq = FSQ(list(chosen), preserve_symmetry=preserve_symmetry, noise_dropout=noise_dropout)
        self.levels = (chosen,)
        self.vocab_size, self.channels, self.spread = vocab_size, len(chosen), spread

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized_BNC, codes_BN = self.fsq(z_BNC)
        if not self.training or not self.spread:
            return quantized_BNC, codes_BN, z_BNC.new_zeros(())
        return quantized_BNC, codes_BN, self.spread * _spread_loss(z_BNC.flatten(0, 1))

    def vectors(self, codes: Tensor) -> Tensor:
        return self.fsq.implicit_codebook[codes]


def _spread_loss(z_NC: Tensor) -> Tensor:
    """Return the mean squared distance from mean 0, standard deviation 1 and no correlation between channels."""
    centred_NC = z_NC - z_NC.mean(0)
    deviation_C = (centred_NC.square().mean(0) + 1e-6).sqrt()
    correlation_CC = (centred_NC.T @ centred_NC) / len(z_NC) / torch.outer(deviation_C, deviation_C)
    excess_CC = correlation_CC - torch.eye(z_NC.shape[1], device=z_NC.device)
    return z_NC.mean(0).square().mean() + (deviation_C - 1).square().mean() + excess_CC.square().mean()


class EMAVQQuantizer(Quantizer):
    """VQ whose codebook is a moving average of its inputs (arXiv 1711.00937, appendix A.1).

    The codebook is initialised by k-means. Dead codes are replaced by input vectors.

    Args:
        decay: decay of the moving average, in [0, 1).
        commitment: weight of the commitment loss, which pulls inputs towards their codes.
        revive_below: threshold of the moving average of a code's count per step. Codes below the threshold are replaced
            by input vectors of the step. The threshold is at most a quarter of the mean count of all codes.
        rotation_trick: rotate and scale gradients from code to input (arXiv 2410.06424) instead of straight-through.
        cosine: compare vectors and codes by cosine similarity.
    """

    updated_in_forward = True
    advice = "raise --batch_size, or lower --lr, or choose a smaller vocabulary"

    def __init__(
        self,
        vocab_size: int,
        *,
        channels: int = 8,
        decay: float = 0.99,
        commitment: float = 0.25,
        revive_below: float = 2.0,
        rotation_trick: bool = True,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"emavq{vocab_size}: decay {decay} must be from 0 to less than 1")
        self.vocab_size, self.channels = vocab_size, channels
        self._ranks, self._revive_below = _ranks(), revive_below
        self.vq = VectorQuantize(
            dim=channels,
            codebook_size=vocab_size,
            decay=decay,
            kmeans_init=True,
            threshold_ema_dead_code=revive_below,
            rotation_trick=rotation_trick,
            commitment_weight=commitment,
            use_cosine_sim=cosine,
            sync_codebook=self._ranks > 1,
        )

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            if not self.vq._codebook.initted:
                raise ValueError("the codebook was never trained, so the first input of `encode` would initialise it")
            return self._nearest(z_BNC)
        if self._ranks != _ranks():
            raise ValueError("build the tokenizer after the process group, or each process trains its own codebook")
        # `cluster_size` and so the threshold are equal in all processes. If only some processes replaced codes, they
        # would wait forever in a collective operation.
        quarter = self.vq._codebook.cluster_size.sum() / (4 * self.vocab_size)
        self.vq._codebook.threshold_ema_dead_code = quarter.clamp(max=self._revive_below)
        return self.vq(z_BNC)

    def _nearest(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize in slices, since the package allocates several (vectors, codes) matrices."""
        slices = z_BNC.flatten(0, 1).split(max(1, _PAIRS // self.vocab_size))
        parts = zip(*(self.vq(slice_NC[None])[:2] for slice_NC in slices), strict=True)
        quantized_BNC, codes_BN = (torch.cat(part, 1)[0].unflatten(0, z_BNC.shape[:2]) for part in parts)
        return quantized_BNC, codes_BN, z_BNC.new_zeros(())

    def codebook(self) -> Tensor:
        return self.vq.codebook


def _ranks() -> int:
    """Return the world size, or 1 if there is no process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class LFQQuantizer(Quantizer):
    """LFQ (arXiv 2310.05737): the digits of a code are the signs of the channels.

    Args:
        entropy: weight of the entropy loss, which lowers the entropy of p(code | vector) and raises that of its mean.
        diversity: weight of the entropy of the mean, relative to the mean entropy of p(code | vector).
        commitment: weight of the commitment loss, which pulls vectors towards their signs.
        inverse_temperature: inverse temperature of p(code | vector).
        spherical: project vectors on the unit sphere first, as in BSQ (arXiv 2406.07548).
    """

    advice = "raise the quantizer's entropy weight (--model.options '{entropy: 0.1}') or its diversity"

    def __init__(
        self,
        vocab_size: int,
        *,
        entropy: float = 0.02,
        diversity: float = 1.0,
        commitment: float = 0.25,
        inverse_temperature: float = 1.0,
        spherical: bool = False,
    ) -> None:
        super().__init__()
        if vocab_size & (vocab_size - 1):
            raise ValueError(f"lfq{vocab_size}: the vocabulary of LFQ must be a power of 2")
        if not inverse_temperature > 0:
            raise ValueError(f"lfq{vocab_size}: inverse_temperature {inverse_temperature} must be above 0")
        self.lfq = LFQ(codebook_size=vocab_size, spherical=spherical)
        self.vocab_size, self.channels = vocab_size, self.lfq.codebook_dim
        self.levels = ((2,) * self.channels,)
        self._entropy, self._diversity, self._commitment = entropy, diversity, commitment
        self._inverse_temperature = inverse_temperature

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_BNC = self.lfq.maybe_l2norm(z_BNC)
        codes_BN = ((z_BNC > 0) * self.lfq.mask).sum(-1)
        quantized_BNC = self.vectors(codes_BN)
        if not self.training:
            return quantized_BNC, codes_BN, z_BNC.new_zeros(())
        loss = self._entropy * self._entropy_loss(z_BNC.flatten(0, 1))
        loss = loss + self._commitment * (z_BNC - quantized_BNC).square().mean()
        return z_BNC + (quantized_BNC - z_BNC).detach(), codes_BN, loss

    def _entropy_loss(self, z_NC: Tensor) -> Tensor:
        """Return the mean entropy of p(code | vector) minus the weighted entropy of its mean over all processes.

        The loss of vector-quantize-pytorch (1.32) is not used, because with several processes its mean over all vectors is
        the mean of one process divided by the world size.
        """
        codebook_VC = self.lfq.maybe_l2norm(self.lfq.codebook)
        # Every entry of the codebook is +value or -value. Channels are independent, so the entropy of a vector's codes is
        # the sum of the entropies of its signs.
        value = codebook_VC.abs().max()
        logit_NC = (4 * self._inverse_temperature * value * z_NC).abs()
        entropy_of_each = (F.softplus(-logit_NC) + logit_NC * torch.sigmoid(-logit_NC)).sum(-1).mean()

        def summed_probabilities(slice_NC: Tensor) -> Tensor:
            return (2 * self._inverse_temperature * slice_NC @ codebook_VC.T).softmax(-1).sum(0)

        # A full (vectors, codes) matrix needs too much memory, so each slice is recomputed in the backward pass.
        slices = z_NC.split(max(1, _PAIRS // self.vocab_size))
        mean_V = sum(checkpoint(summed_probabilities, part, use_reentrant=False) for part in slices) / len(z_NC)
        if _ranks() > 1:
            all_V = mean_V.detach().clone()
            distributed.all_reduce(all_V)
            mean_V = mean_V + (all_V / _ranks() - mean_V).detach()
        return entropy_of_each + self._diversity * (mean_V * mean_V.clamp_min(1e-20).log()).sum()

    def vectors(self, codes: Tensor) -> Tensor:
        return self.lfq.indices_to_codes(codes.flatten()[None]).unflatten(1, codes.shape)[0]


class SimVQQuantizer(Quantizer):
    """SimVQ (arXiv 2411.02038): a frozen random codebook followed by a trained linear layer, which moves all codes at once.

    Args:
        commitment: weight of the loss that pulls inputs and their codes towards each other.
        input_commitment: weight of the part of this loss that moves inputs, relative to the part that moves codes.
        rotation_trick: rotate and scale gradients from code to input (arXiv 2410.06424) instead of straight-through.
    """

    advice = "lower --lr, or the quantizer's input_commitment (--model.options '{input_commitment: 0.1}')"

    def __init__(
        self,
        vocab_size: int,
        *,
        channels: int = 16,
        commitment: float = 1.0,
        input_commitment: float = 0.25,
        rotation_trick: bool = True,
    ) -> None:
        super().__init__()
        self.sim = SimVQ(
            dim=channels,
            codebook_size=vocab_size,
            commitment_weight=commitment,
            input_to_quantize_commit_loss_weight=input_commitment,
            rotation_trick=rotation_trick,
        )
        self.vocab_size, self.channels = vocab_size, channels

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized_BNC, codes_BN, loss = self.sim(z_BNC)
        # The package returns rotated vectors also in evaluation mode. The decoder needs exactly the vectors of the codes.
        return quantized_BNC if self.training else self.vectors(codes_BN), codes_BN, loss

    def codebook(self) -> Tensor:
        with torch.autocast(self.sim.frozen_codebook.device.type, enabled=False):
            return self.sim.codebook


LARGEST = 2**20
"""Largest vocabulary size: above that of any published tokenizer, with a codebook that still fits into memory."""
MOST_CODES = 64
"""Most codes of a place."""
QUANTIZERS = {"fsq": FSQQuantizer, "emavq": EMAVQQuantizer, "lfq": LFQQuantizer, "simvq": SimVQQuantizer}


class Grouped(Quantizer):
    """Several quantizers of the same kind side by side: each takes a part of the channels and gives one code of a place.

    Product quantization as in UniTok (arXiv 2502.20321): G small vocabularies keep as many bits as one of V^G codes.
    """

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.codes_per_place, first = len(parts), parts[0]
        self.vocab_size, self.advice, self.updated_in_forward = first.vocab_size, first.advice, first.updated_in_forward
        self.channels = sum(part.channels for part in parts)
        self.levels = None if first.levels is None else tuple(chain(*(part.levels or () for part in parts)))

    @property
    def _quantizers(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.parts))

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = z_BNC.split([part.channels for part in self._quantizers], -1)
        outputs = [part.quantize(z) for part, z in zip(self._quantizers, parts, strict=True)]
        quantized, codes, losses = zip(*outputs, strict=True)
        return torch.cat(quantized, -1), torch.stack(codes, -1), torch.stack(losses).mean()

    def vectors(self, codes: Tensor) -> Tensor:
        pairs = zip(self._quantizers, codes.unbind(-1), strict=True)
        return torch.cat([part.vectors(codes_of_part) for part, codes_of_part in pairs], -1)

    def codebook(self) -> Tensor | None:
        codebooks = [codebook for part in self._quantizers if (codebook := part.codebook()) is not None]
        return torch.cat(codebooks) if codebooks else None


def make_quantizer(name: str, options: dict[str, Any]) -> Quantizer:
    """Return the quantizer with a name: its kind and vocabulary size, for example `fsq1000`, or `4xfsq1000` for four codes.

    Raises:
        ValueError: if the name is invalid, or an option is unknown, of the wrong type or out of range.
    """
    match = re.fullmatch(r"(?:([1-9][0-9]?)x)?([a-z]+)([1-9][0-9]{0,6})", name)
    if match is None or match[2] not in QUANTIZERS or not 2 <= int(match[3]) <= LARGEST:
        kinds = ", ".join(f"{kind}N" for kind in QUANTIZERS)
        raise ValueError(f"invalid quantizer {name!r}: expected one of {kinds} with N from 2 to {LARGEST}, or GxfsqN")
    groups, kind, vocab_size = int(match[1] or 1), match[2], int(match[3])
    if groups > MOST_CODES:
        raise ValueError(f"{name}: a place may have at most {MOST_CODES} codes, got {groups}")
    parameters = inspect.signature(QUANTIZERS[kind]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in defaults:
            raise ValueError(f"{kind} has no option {option!r}; it has {', '.join(defaults)}")
        _check_option(f"{kind}'s {option}", value, defaults[option])
    quantizers = [QUANTIZERS[kind](vocab_size, **options) for _ in range(groups)]
    return quantizers[0] if groups == 1 else Grouped(quantizers)


def _check_option(name: str, value: Any, default: Any) -> None:
    """Raise ValueError unless an option is valid for the type of its default; FSQ checks the values of `levels` itself."""
    if isinstance(default, bool):
        valid, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        valid, expected = type(value) is int and value >= 1, "an integer of at least 1"
    elif isinstance(default, float):
        valid, expected = type(value) in (int, float) and 0 <= value < math.inf, "a finite number of at least 0"
    else:
        valid = value is None or isinstance(value, list | tuple) and all(type(level) is int for level in value)
        expected = "a list of integers, for example [8, 5, 5, 5]"
    if not valid:
        raise ValueError(f"{name} is {value!r}, but must be {expected}")
