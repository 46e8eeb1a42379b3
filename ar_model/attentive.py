"""Attentive probe: a learned query reads the tokens of a frozen network, and a linear classifier what it has read.

As the probe of CAE (arXiv 2202.03026, section 4): one layer of cross-attention, normalisation without parameters, a linear
classifier. The query is a parameter, so its product with the keys' projection is one vector per head: a clip costs L * D * heads
multiplications, not L * D * D.

Folds share what they read: the probes of all are trained side by side on the same batches, each on those of their samples that it
is not tested on, so that a step reads and multiplies tokens once for all of them.

Legend: N samples, B of them, L tokens, D width, F folds, H heads, C classes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

HEADS = 8
EPOCHS, LEAST_STEPS, MOST_STEPS, BATCH = 30, 100, 400, 64
LR, WEIGHT_DECAY = 3e-3, 0.05
MOMENTUM, EPS = 0.1, 1e-5


class AttentiveProbes(nn.Module):
    """Class scores (F, B, C) of tokens (B, L, D), which each fold standardises by the mean and deviation of its features."""

    def __init__(self, mean_FD: Tensor, deviation_FD: Tensor, classes: int) -> None:
        super().__init__()
        folds, width = mean_FD.shape
        self.mean_FD, self.scale_FD = nn.Buffer(mean_FD), nn.Buffer(1 / deviation_FD.clamp(min=1e-6))
        self.query_FDH = nn.Parameter(torch.randn(folds, width, HEADS) / math.sqrt(width))
        self.value = _Linears(folds, HEADS * width, width)
        self.norm = _Norms(folds, width)
        self.classify = _Linears(folds, width, classes)

    def forward(self, x_BLD: Tensor, counts_FB: Tensor | None = None) -> Tensor:
        """`counts_FB`, in training: whether each fold trains on each sample."""
        # Not the tokens are standardised, but what multiplies and what was read: a mean moves all scores of a head alike.
        x_BLD = x_BLD.float()
        query_DE = rearrange(self.scale_FD[..., None] * self.query_FDH, "f d h -> d (f h)")
        read_BED = (x_BLD @ query_DE).softmax(1).transpose(1, 2) @ x_BLD
        read_FBHD = rearrange(read_BED, "b (f h) d -> f b h d", h=HEADS)
        read_FBHD = (read_FBHD - self.mean_FD[:, None, None]) * self.scale_FD[:, None, None]
        return self.classify(self.norm(self.value(read_FBHD.flatten(2)), counts_FB))


class _Linears(nn.Module):
    """A linear layer for each fold."""

    def __init__(self, folds: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight_FOI = nn.Parameter(torch.empty(folds, outputs, inputs).uniform_(-bound, bound))
        self.bias_FO = nn.Parameter(torch.empty(folds, outputs).uniform_(-bound, bound))

    def forward(self, x_FBI: Tensor) -> Tensor:
        return einsum(x_FBI, self.weight_FOI, "f b i, f o i -> f b o") + self.bias_FO[:, None]


class _Norms(nn.Module):
    """Batch normalisation without parameters for each fold, by the samples that it trains on."""

    def __init__(self, folds: int, width: int) -> None:
        super().__init__()
        self.mean_F1D, self.variance_F1D = (
            nn.Buffer(torch.zeros(folds, 1, width)),
            nn.Buffer(torch.ones(folds, 1, width)),
        )

    def forward(self, x_FBD: Tensor, counts_FB: Tensor | None) -> Tensor:
        if counts_FB is None:
            return (x_FBD - self.mean_F1D) * (self.variance_F1D + EPS).rsqrt()
        counts_FB1 = counts_FB[..., None].to(x_FBD.dtype)
        samples_F11 = counts_FB1.sum(1, keepdim=True)
        mean_F1D = (x_FBD * counts_FB1).sum(1, keepdim=True) / samples_F11.clamp(min=1)
        off_FBD = x_FBD - mean_F1D
        square_F1D = (off_FBD.square() * counts_FB1).sum(1, keepdim=True)
        variance_F1D = square_F1D / samples_F11.clamp(min=1)
        with torch.no_grad():  # what is kept for later is without bias
            known_F11 = MOMENTUM * (samples_F11 > 1)
            self.mean_F1D.lerp_(mean_F1D, known_F11)
            self.variance_F1D.lerp_(square_F1D / (samples_F11 - 1).clamp(min=1), known_F11)
        return off_FBD * (variance_F1D + EPS).rsqrt()


def attentive_predict(
    x_NLD: np.ndarray,
    y_N: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    seed: int = 0,
    device: torch.device | None = None,
) -> list[np.ndarray]:
    """Labels of the tested samples of each fold, by a probe trained on its others: a function of `seed`.

    Args:
        x_NLD: frozen tokens, which may lie in a file.
        y_N: labels of any kind.
        folds: numbers of the samples to train on and to test on.
    """
    classes, y_N = np.unique(y_N, return_inverse=True)
    trains_FN = np.zeros((len(folds), len(y_N)), dtype=bool)
    for trains_N, (train, _) in zip(trains_FN, folds, strict=True):
        trains_N[train] = True
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        moments_F2D = torch.stack([_moments(x_NLD, train) for train, _ in folds])
        probes = AttentiveProbes(moments_F2D[:, 0], moments_F2D[:, 1], len(classes)).to(device)
    _train(probes, x_NLD, torch.from_numpy(y_N), torch.from_numpy(trains_FN), seed, device)
    tested = np.unique(np.concatenate([test for _, test in folds]))
    with torch.inference_mode():
        parts = [tested[first : first + BATCH] for first in range(0, len(tested), BATCH)]
        answers_FM = torch.cat([probes(_tokens(x_NLD, rows, device)).argmax(2).cpu() for rows in parts], dim=1).numpy()
    return [
        classes[answer_M[np.searchsorted(tested, test)]]
        if len(train) > 1
        else np.repeat(classes[y_N[train]], len(test))
        for answer_M, (train, test) in zip(answers_FM, folds, strict=True)
    ]


def _train(
    probes: AttentiveProbes, x_NLD: np.ndarray, y_N: Tensor, trains_FN: Tensor, seed: int, device: torch.device | None
) -> None:
    optimizer = torch.optim.AdamW(probes.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    batches = _batches(trains_FN.any(0).numpy().nonzero()[0], seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches), pct_start=0.1)
    for rows in batches:
        y_B, counts_FB = y_N[rows].to(device), trains_FN[:, rows].to(device)
        scores_FBC = probes(_tokens(x_NLD, rows, device), counts_FB)
        nats_FB = F.cross_entropy(scores_FBC.flatten(0, 1), y_B.repeat(len(counts_FB)), reduction="none").view_as(
            counts_FB
        )
        loss = (nats_FB * counts_FB).sum(1) / counts_FB.sum(1).clamp(min=1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()


def _batches(train: np.ndarray, seed: int) -> Sequence[np.ndarray]:
    """EPOCHS of batches of distinct samples, but not fewer nor more than the limits; each epoch in an order of its own."""
    draw, size = np.random.default_rng(seed), min(BATCH, len(train))
    per_epoch = len(train) // size
    steps = min(max(EPOCHS * per_epoch, LEAST_STEPS), MOST_STEPS)
    epochs = [draw.permutation(train) for _ in range(math.ceil(steps / per_epoch))]
    return [np.sort(order[i * size : (i + 1) * size]) for order in epochs for i in range(per_epoch)][:steps]


def _tokens(x_NLD: np.ndarray, rows: np.ndarray, device: torch.device | None) -> Tensor:
    return torch.from_numpy(x_NLD[rows]).to(device)


def _moments(x_NLD: np.ndarray, train: np.ndarray) -> Tensor:
    """Mean and deviation of every feature over the tokens of the training samples, (2, D)."""
    count, total_D, square_D = 0, 0.0, 0.0
    for first in range(0, len(train), BATCH):
        x_MD = x_NLD[train[first : first + BATCH]].reshape(-1, x_NLD.shape[-1]).astype(np.float64)
        count, total_D, square_D = count + len(x_MD), total_D + x_MD.sum(0), square_D + (x_MD**2).sum(0)
    mean_D = total_D / count
    deviation_D = np.sqrt(np.maximum(square_D / count - mean_D**2, 0))
    return torch.from_numpy(np.stack([mean_D, deviation_D])).float()
