"""Attentive probe: a learned query attends to the tokens of a frozen network, and a linear classifier predicts the label.

It follows the probe of CAE (arXiv 2202.03026, section 4): one layer of cross-attention, normalisation without parameters, and a
linear classifier. The query is a parameter, so the query and key projections merge into one learned vector per head. A clip then
costs L * D * H multiplications instead of L * D * D.

Attention alone does not see the order of tokens, and a frozen network need not write it into its features. So fixed encodings of
the positions are added to the standardised tokens before attention.

The probes of all folds are trained together on the same batches, so that each batch of tokens is read once. Each probe learns
from the samples of the batch that are in its fold's training set.

Legend: N samples, B samples of a batch, M some samples, L tokens, P places along an axis, D width, F folds, H heads, E = F * H,
C classes, I inputs and O outputs of a linear layer.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ar_model.folds import Fold
from ar_model.inputs import Grid
from ar_model.transformer import axis_channels, sincos_positions

HEADS = 8
EPOCHS, MIN_STEPS, BATCH = 30, 100, 64
LR = 3e-3
DECAYS = (0.05, 5.0)
"""Weight decays to choose from. Values between them give about the same accuracy."""
MOMENTUM, EPS = 0.1, 1e-5
"""PyTorch's defaults of batch normalisation."""


class AttentiveProbes(nn.Module):
    """One attentive probe per fold, each on features standardised by the mean and standard deviation of its training set.

    Encodings of positions are added to the standardised tokens of the grid, which are the last of `length` tokens.
    """

    def __init__(self, mean_FD: Tensor, std_FD: Tensor, grid: Grid, length: int, classes: int) -> None:
        super().__init__()
        self._grid = grid
        folds, width = mean_FD.shape
        self.mean_FD, self.scale_FD = nn.Buffer(mean_FD), nn.Buffer(1 / std_FD.clamp(min=1e-6))
        position_LD = sincos_positions(grid, width)
        self.position_LD = nn.Buffer(F.pad(position_LD, (0, 0, length - len(position_LD), 0)))
        self.query_FDH = nn.Parameter(torch.randn(folds, width, HEADS) / math.sqrt(width))
        self.value = _Linears(folds, HEADS * width, width)
        self.norm = _Norms(folds, width)
        self.classify = _Linears(folds, width, classes)

    def forward(self, x_BLD: Tensor, trains_FB: Tensor | None = None) -> Tensor:
        """Return the class logits (F, B, C). `trains_FB`: bool, true if a fold trains on a sample; None in evaluation."""
        # The query and the pooled output are standardised instead of all tokens. The query needs no mean: subtracting a mean
        # shifts all attention logits of a head equally, and the softmax ignores such a shift.
        x_BLD = x_BLD.float()
        query_ED = rearrange(self.scale_FD[..., None] * self.query_FDH, "f d h -> (f h) d")
        position_EL = rearrange(self.query_FDH, "f d h -> (f h) d") @ self.position_LD.T
        # One product per sample: a single product for all samples has a gradient that is slow on CPUs if E is small.
        logits_BEL = torch.baddbmm(position_EL, query_ED.expand(len(x_BLD), -1, -1), x_BLD.transpose(1, 2))
        share_BEL = logits_BEL.softmax(2)
        pooled_FBHD, position_FBHD = (
            rearrange(part_BED, "b (f h) d -> f b h d", h=HEADS)
            for part_BED in (share_BEL @ x_BLD, self._pooled_positions(share_BEL))
        )
        pooled_FBHD = (pooled_FBHD - self.mean_FD[:, None, None]) * self.scale_FD[:, None, None] + position_FBHD
        return self.classify(self.norm(self.value(pooled_FBHD.flatten(2)), trains_FB))

    def _pooled_positions(self, share_BEL: Tensor) -> Tensor:
        """Return `share_BEL @ position_LD`, (B, E, D), in less time.

        Each channel depends on one axis of the grid only, so the shares of all tokens at a place along the axis are added first.
        """
        tokens = math.prod(self._grid)
        share_BEthw = share_BEL[..., -tokens:].unflatten(-1, self._grid)
        share_BEth = share_BEthw.sum(4)
        shares = (share_BEth.sum(3), share_BEth.sum(2), share_BEthw.sum((2, 3)))
        encoding_thwD = self.position_LD[-tokens:].unflatten(0, self._grid)
        encodings = (encoding_thwD[:, 0, 0], encoding_thwD[0, :, 0], encoding_thwD[0, 0])
        channels = axis_channels(self.position_LD.shape[1])
        pooled = [
            share_BEP @ encoding_PD.split(channels, 1)[axis]
            for axis, (share_BEP, encoding_PD) in enumerate(zip(shares, encodings, strict=True))
        ]
        return torch.cat(pooled, dim=-1)


class _Linears(nn.Module):
    """One linear layer per fold, (F, B, I) -> (F, B, O)."""

    def __init__(self, folds: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight_FOI = nn.Parameter(torch.empty(folds, outputs, inputs).uniform_(-bound, bound))
        self.bias_FO = nn.Parameter(torch.empty(folds, outputs).uniform_(-bound, bound))

    def forward(self, x_FBI: Tensor) -> Tensor:
        return einsum(x_FBI, self.weight_FOI, "f b i, f o i -> f b o") + self.bias_FO[:, None]


class _Norms(nn.Module):
    """One batch normalisation without affine parameters per fold, with the statistics of the fold's training samples."""

    def __init__(self, folds: int, width: int) -> None:
        super().__init__()
        self.mean_F1D = nn.Buffer(torch.zeros(folds, 1, width))
        self.variance_F1D = nn.Buffer(torch.ones(folds, 1, width))

    def forward(self, x_FBD: Tensor, trains_FB: Tensor | None) -> Tensor:
        if trains_FB is None:
            return (x_FBD - self.mean_F1D) * (self.variance_F1D + EPS).rsqrt()
        trains_FB1 = trains_FB[..., None].to(x_FBD.dtype)
        samples_F11 = trains_FB1.sum(1, keepdim=True)
        mean_F1D = (x_FBD * trains_FB1).sum(1, keepdim=True) / samples_F11.clamp(min=1)
        centred_FBD = x_FBD - mean_F1D
        square_F1D = (centred_FBD.square() * trains_FB1).sum(1, keepdim=True)
        with torch.no_grad():
            # As in nn.BatchNorm1d, the running variance is unbiased, so a single sample cannot update it.
            momentum_F11 = torch.where(samples_F11 > 1, MOMENTUM, 0.0)
            self.mean_F1D.lerp_(mean_F1D, momentum_F11)
            self.variance_F1D.lerp_(square_F1D / (samples_F11 - 1).clamp(min=1), momentum_F11)
        return centred_FBD * (square_F1D / samples_F11.clamp(min=1) + EPS).rsqrt()


def attentive_predict(
    x_NLD: np.ndarray,
    y_N: np.ndarray,
    folds: Sequence[Fold],
    decays: Sequence[float],
    grid: Grid,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[np.ndarray]:
    """Train one attentive probe per fold and return the predicted labels of its test samples, fold by fold.

    Args:
        x_NLD: tokens of a frozen network; may be a NumPy memmap. The last t * h * w tokens are in raster order.
        y_N: labels of any dtype that NumPy can sort.
        decays: weight decay of each fold's probe.
        grid: number of tokens along (t, h, w). Tokens before the grid have no position.
        seed: seed for initialisation and batch order; the global random state is neither used nor changed.
    """
    classes, y_N = np.unique(y_N, return_inverse=True)
    trains_FN = np.stack([np.isin(np.arange(len(y_N)), fold.train) for fold in folds])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean_FD, std_FD = _moments(x_NLD, trains_FN)
        probes = AttentiveProbes(mean_FD, std_FD, grid, x_NLD.shape[1], len(classes)).to(device)
    _train(probes, x_NLD, torch.from_numpy(y_N), torch.from_numpy(trains_FN), torch.tensor(decays), seed)
    tested = np.unique(np.concatenate([fold.test for fold in folds]))
    with torch.inference_mode():
        batches = np.split(tested, range(BATCH, len(tested), BATCH))
        class_FM = torch.cat([probes(_tokens(x_NLD, rows, device)).argmax(2).cpu() for rows in batches], dim=1).numpy()
    labels = []
    for class_M, fold in zip(class_FM, folds, strict=True):
        # Batch normalisation cannot be trained on a single sample: predict the label of that sample.
        single = np.repeat(y_N[fold.train[:1]], len(fold.test))
        labels.append(classes[class_M[np.searchsorted(tested, fold.test)] if len(fold.train) > 1 else single])
    return labels


def _train(
    probes: AttentiveProbes, x_NLD: np.ndarray, y_N: Tensor, trains_FN: Tensor, decay_F: Tensor, seed: int
) -> None:
    device = probes.mean_FD.device
    # The decay of AdamW has one value for all folds.
    optimizer = torch.optim.AdamW(probes.parameters(), lr=LR, weight_decay=0)
    batches = _batches(trains_FN.any(0).numpy().nonzero()[0], seed)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches), pct_start=0.1)
    decay_F = decay_F.to(device, torch.float32)
    for rows in batches:
        trains_FB = trains_FN[:, rows].to(device)
        y_FB = y_N[rows].to(device).expand_as(trains_FB)
        logits_FBC = probes(_tokens(x_NLD, rows, device), trains_FB)
        nats_FB = F.cross_entropy(logits_FBC.flatten(0, 1), y_FB.flatten(), reduction="none").view_as(trains_FB)
        loss_F = (nats_FB * trains_FB).sum(1) / trains_FB.sum(1).clamp(min=1)
        optimizer.zero_grad()
        loss_F.sum().backward()
        kept_F = 1 - rates.get_last_lr()[0] * decay_F
        with torch.no_grad():
            for parameter in probes.parameters():
                parameter.mul_(kept_F.view(-1, *[1] * (parameter.ndim - 1)))
        optimizer.step()
        rates.step()


def schedule(samples: int) -> tuple[int, float]:
    """Return the number of steps and of epochs for a number of samples: EPOCHS epochs, but at least MIN_STEPS steps."""
    size = min(BATCH, samples)
    steps = max(math.ceil(EPOCHS * samples / size), MIN_STEPS)
    return steps, steps * size / samples


def _batches(train: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return the sorted sample indices of each step."""
    generator, size = np.random.default_rng(seed), min(BATCH, len(train))
    steps, per_epoch = schedule(len(train))[0], len(train) // size
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        # Each order of the samples is used for its full batches.
        order = generator.permutation(train)[: per_epoch * size]
        batches += list(np.sort(order.reshape(per_epoch, size), axis=1))
    return batches[:steps]


def _tokens(x_NLD: np.ndarray, rows: np.ndarray, device: torch.device | None) -> Tensor:
    return torch.from_numpy(x_NLD[rows]).to(device)


def _moments(x_NLD: np.ndarray, trains_FN: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every feature over the tokens of each fold's training samples, (F, D) each."""
    count_F1 = trains_FN.sum(1, keepdims=True) * x_NLD.shape[1]
    total_FD, square_FD = 0.0, 0.0
    trained = trains_FN.any(0).nonzero()[0]
    for rows in np.split(trained, range(BATCH, len(trained), BATCH)):
        x_MLD = x_NLD[rows].astype(np.float64)
        total_FD = total_FD + trains_FN[:, rows] @ x_MLD.sum(1)
        square_FD = square_FD + trains_FN[:, rows] @ np.square(x_MLD).sum(1)
    mean_FD = total_FD / count_F1
    std_FD = np.sqrt(np.maximum(square_FD / count_F1 - mean_FD**2, 0))
    return torch.from_numpy(mean_FD).float(), torch.from_numpy(std_FD).float()
