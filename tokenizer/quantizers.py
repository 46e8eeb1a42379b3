"""Quantizers of vector-quantize-pytorch behind one signature.

Each class takes the size of its vocabulary and, by name, the options that matter.

Legend: B samples, N vectors, C channels, V codes.
"""

import inspect
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize

_PAIRS = 2**24
"""Vectors times codes that are compared at once."""


class Quantizer(nn.Module):
    """Vectors (B, N, C) -> (quantized vectors (B, N, C), codes (B, N) int64, auxiliary loss). Always in fp32."""

    vocab_size: int
    channels: int
    levels: tuple[int, ...] | None = None
    advice: str
    """What to do when only a few codes are used."""

    def forward(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z_BNC.device.type, enabled=False):
            quantized_BNC, codes_BN, loss = self.quantize(z_BNC.float())
        return quantized_BNC, codes_BN.long(), loss

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` in fp32."""
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """Quantized vectors of codes, (...) -> (..., C)."""
        raise NotImplementedError

    def codebook(self) -> Tensor | None:
        """Vectors of a learned codebook, (V, C); None if codes are made of digits."""
        return None


class FSQQuantizer(Quantizer):
    """FSQ (arXiv 2309.15505): every channel rounded to a few levels. No state: nothing to synchronise.

    Its one way to collapse is saturation: where the tanh in front is flat no gradient brings a channel back. `spread` pulls
    the vectors of a batch towards mean 0, deviation 1 and no correlation, which keeps them where the tanh is not flat.

    Args:
        levels: values of each digit; by default those of the paper's table 1 for the vocabulary.
        spread: weight of that pull.
        preserve_symmetry: levels lie symmetric around 0 (arXiv 2411.19842).
        noise_dropout: share of values that get noise after rounding, up to half of 1 either way, in training, as
            vector-quantize-pytorch does it; needs preserve_symmetry.
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
            raise ValueError(
                f"fsq{vocab_size}: FSQ has levels for {', '.join(map(str, self.TABLE))}; give others as `levels`"
            )
        self.levels = tuple(self.TABLE[vocab_size] if levels is None else levels)
        if math.prod(self.levels) != vocab_size or not all(3 <= n <= 1000 for n in self.levels or (0,)):
            raise ValueError(
                f"fsq{vocab_size}: levels {self.levels} must be from 3 to 1000 each and multiply to {vocab_size}"
            )
        if noise_dropout and not preserve_symmetry:
            raise ValueError(f"fsq{vocab_size}: noise_dropout needs preserve_symmetry")
        if noise_dropout > 1:
            raise ValueError(f"fsq{vocab_size}: noise_dropout {noise_dropout} is a share, so not above 1")
        self.fsq = FSQ(list(self.levels), preserve_symmetry=preserve_symmetry, noise_dropout=noise_dropout)
        self.vocab_size, self.channels, self.spread = vocab_size, len(self.levels), spread

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized_BNC, codes_BN = self.fsq(z_BNC)
        loss = self.spread * _uneven(z_BNC.flatten(0, 1)) if self.training and self.spread else z_BNC.new_zeros(())
        return quantized_BNC, codes_BN, loss

    def vectors(self, codes: Tensor) -> Tensor:
        return self.fsq.implicit_codebook[codes]


def _uneven(z_NC: Tensor) -> Tensor:
    """How far vectors are from mean 0, deviation 1 and no correlation between channels."""
    centred_NC = z_NC - z_NC.mean(0)
    deviation_C = (centred_NC.square().mean(0) + 1e-6).sqrt()
    correlation_CC = (centred_NC.T @ centred_NC) / len(z_NC) / torch.outer(deviation_C, deviation_C)
    identity_CC = torch.eye(z_NC.shape[1], device=z_NC.device)
    return (
        z_NC.mean(0).square().mean()
        + (deviation_C - 1).square().mean()
        + (correlation_CC - identity_CC).square().mean()
    )


class EMAVQQuantizer(Quantizer):
    """VQ whose codebook follows its inputs (arXiv 1711.00937, appendix A.1), started by k-means, dead codes revived.

    Args:
        channels: of each vector.
        decay: of the moving average.
        commitment: weight of the pull of the inputs towards their codes.
        revive_below: a code that this many vectors of a step choose, or fewer, on average, is replaced by a vector of the
            step; a quarter of the even share, where that is less.
        rotation_trick: gradients are rotated and scaled from the code to the input (arXiv 2410.06424); else copied.
        cosine: codes are compared by angle.
    """

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
        if vocab_size < 2 or channels < 1:
            raise ValueError(f"emavq{vocab_size}: a codebook of {vocab_size} vectors of {channels} channels is none")
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
        if not self.training and not self.vq._codebook.initted:
            raise ValueError("the codebook was never trained: its codes would mean whatever is encoded first")
        if self.training and self._ranks != _ranks():
            raise ValueError(
                "the tokenizer was built before the process group: each process would train its own codebook"
            )
        if not self.training:
            return self._nearest(z_BNC)
        # Of the same counts in all processes: if only some replaced codes, they would wait for the others forever.
        share = self.vq._codebook.cluster_size.sum() / (4 * self.vocab_size)
        self.vq._codebook.threshold_ema_dead_code = share.clamp(max=self._revive_below)
        return self.vq(z_BNC)

    def _nearest(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In slices: the package lays out every vector beside every code, several times."""
        slices = z_BNC.flatten(0, 1).split(max(1, _PAIRS // self.vocab_size))
        quantized, codes, _ = zip(*(self.vq(slice_NC[None]) for slice_NC in slices), strict=True)
        shape = z_BNC.shape[:2]
        return (
            torch.cat(quantized, 1)[0].unflatten(0, shape),
            torch.cat(codes, 1)[0].unflatten(0, shape),
            z_BNC.new_zeros(()),
        )

    def vectors(self, codes: Tensor) -> Tensor:
        return self.codebook()[codes]

    def codebook(self) -> Tensor:
        return self.vq.codebook


def _ranks() -> int:
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if grouped else 1


class LFQQuantizer(Quantizer):
    """LFQ (arXiv 2310.05737): a code is the signs of the channels.

    Args:
        entropy: weight of the entropy loss: sure of each code, all codes used alike.
        diversity: weight of the second part beside the first.
        commitment: weight of the pull towards the signs.
        inverse_temperature: of the soft assignment that the entropies are of.
        spherical: vectors are put on the unit sphere first, which is BSQ (arXiv 2406.07548).
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
        if vocab_size < 2 or vocab_size & (vocab_size - 1):
            raise ValueError(f"lfq{vocab_size}: the vocabulary of LFQ must be a power of 2")
        if not inverse_temperature > 0:
            raise ValueError(f"lfq{vocab_size}: inverse_temperature {inverse_temperature} must be above 0")
        self.lfq = LFQ(codebook_size=vocab_size, spherical=spherical)
        self.vocab_size, self.channels = vocab_size, self.lfq.codebook_dim
        self.levels = (2,) * self.channels
        self._entropy, self._diversity, self._commitment = entropy, diversity, commitment
        self._inverse_temperature = inverse_temperature

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_BNC = self.lfq.maybe_l2norm(z_BNC)
        codes_BN = ((z_BNC > 0) * self.lfq.mask).sum(-1)
        quantized_BNC = self.vectors(codes_BN)
        if not self.training:
            return quantized_BNC, codes_BN, z_BNC.new_zeros(())
        loss = self._entropy * self._unsure(z_BNC.flatten(0, 1))
        loss = loss + self._commitment * (z_BNC - quantized_BNC).square().mean()
        return z_BNC + (quantized_BNC - z_BNC).detach(), codes_BN, loss

    def _unsure(self, z_NC: Tensor) -> Tensor:
        """Mean entropy of each vector's codes, less that of their mean over all vectors of all processes.

        The package's own, of several processes, takes a process's share of that mean for the mean (1.32).
        """
        codebook_VC = self.lfq.maybe_l2norm(self.lfq.codebook)
        value = codebook_VC.abs().max()  # of every channel of every code: +value or -value
        logit_NC = (4 * self._inverse_temperature * value * z_NC).abs()  # channels are independent of each other
        each = (F.softplus(-logit_NC) + logit_NC * torch.sigmoid(-logit_NC)).sum(-1).mean()

        def chances(slice_NC: Tensor) -> Tensor:
            return (2 * self._inverse_temperature * slice_NC @ codebook_VC.T).softmax(-1).sum(0)

        slices = z_NC.split(max(1, _PAIRS // self.vocab_size))  # vectors beside codes are too many to keep
        mean_V = sum(checkpoint(chances, part, use_reentrant=False) for part in slices) / len(z_NC)
        if _ranks() > 1:
            all_V = mean_V.detach().clone()
            torch.distributed.all_reduce(all_V)
            mean_V = mean_V + (all_V / _ranks() - mean_V).detach()
        return each + self._diversity * (mean_V * mean_V.clamp_min(1e-20).log()).sum()

    def vectors(self, codes: Tensor) -> Tensor:
        return self.lfq.indices_to_codes(codes.flatten()[None]).unflatten(1, codes.shape)[0]


class SimVQQuantizer(Quantizer):
    """SimVQ (arXiv 2411.02038): a frozen random codebook behind a trained linear layer, which moves all codes at once.

    Args:
        channels: of each vector.
        commitment: weight of the loss between inputs and their codes.
        input_commitment: weight, within it, of the pull on the inputs.
        rotation_trick: gradients are rotated and scaled from the code to the input (arXiv 2410.06424); else copied.
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
        if vocab_size < 2 or channels < 1:
            raise ValueError(f"simvq{vocab_size}: a codebook of {vocab_size} vectors of {channels} channels is none")
        self.sim = SimVQ(
            dim=channels,
            codebook_size=vocab_size,
            commitment_weight=commitment,
            input_to_quantize_commit_loss_weight=input_commitment,
            rotation_trick=rotation_trick,
        )
        self.vocab_size, self.channels = vocab_size, channels

    def quantize(self, z_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized_BNC, codes_BN, loss = self.sim(
            z_BNC
        )  # rotated ones also in evaluation, where they are to be the codes'
        return quantized_BNC if self.training else self.vectors(codes_BN), codes_BN, loss

    def vectors(self, codes: Tensor) -> Tensor:
        return self.codebook()[codes]

    def codebook(self) -> Tensor:
        with torch.autocast(self.sim.frozen_codebook.device.type, enabled=False):
            return self.sim.codebook


LARGEST = 2**20
"""The largest vocabulary; more than any published tokenizer has, and codebooks of it still fit a machine."""
QUANTIZERS: dict[str, type[Quantizer]] = {
    "fsq": FSQQuantizer,
    "emavq": EMAVQQuantizer,
    "lfq": LFQQuantizer,
    "simvq": SimVQQuantizer,
}


def make_quantizer(name: str, options: dict[str, Any]) -> Quantizer:
    """The quantizer of a name: kind and size of the vocabulary, `fsq1000`.

    Raises:
        ValueError: if there is none, or an option is not one of its.
    """
    match = re.fullmatch(r"([a-z]+)([1-9][0-9]{0,6})", name)
    if match is None or match[1] not in QUANTIZERS or int(match[2]) > LARGEST:
        raise ValueError(
            f"quantizer {name!r} is none of {', '.join(f'{kind}N' for kind in QUANTIZERS)}, N the vocabulary, up to {LARGEST}"
        )
    kind = QUANTIZERS[match[1]]
    known = {p.name: p for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{match[1]} has no option {option!r}; it has {', '.join(known)}")
        _check_wrong(f"{match[1]}'s {option}", value, known[option].default)
    return kind(int(match[2]), **options)


def _check_wrong(what: str, value: Any, default: Any) -> None:
    """A number where a number belongs, yes or no where those do; `levels` is judged by FSQ."""
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    else:
        good = value is None or isinstance(value, list | tuple) and all(type(level) is int for level in value)
    if not good:
        raise ValueError(f"{what} is {value!r}, but must be like {[8, 5, 5, 5] if default is None else default!r}")
