"""Attentive probe: a learned query reads the tokens of a frozen network, and a linear classifier what it has read.

As the probe of CAE (arXiv 2202.03026, section 4): one layer of cross-attention, normalisation without parameters, a linear
classifier. The query is a parameter, so its product with the keys' projection is one vector per head: a clip costs L * D * heads
multiplications, not L * D * D.

Legend: N samples, B of them, L tokens, D width, H heads, C classes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8
EPOCHS, LEAST_STEPS, MOST_STEPS, BATCH = 30, 100, 400, 64
LR, WEIGHT_DECAY = 3e-3, 0.05


class AttentiveProbe(nn.Module):
    """Class scores (B, C) of tokens (B, L, D), which are standardised by the mean and deviation of each feature."""

    def __init__(self, mean_D: Tensor, deviation_D: Tensor, classes: int) -> None:
        super().__init__()
        width = len(mean_D)
        self.mean_D, self.scale_D = nn.Buffer(mean_D), nn.Buffer(1 / deviation_D.clamp(min=1e-6))
        self.query_DH = nn.Parameter(torch.randn(width, HEADS) / math.sqrt(width))
        self.value = nn.Linear(HEADS * width, width)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.classify = nn.Linear(width, classes)

    def forward(self, x_BLD: Tensor) -> Tensor:
        # Not the tokens are standardised, but what multiplies and what was read: a mean moves all scores of a head alike.
        x_BLD = x_BLD.float()
        share_BLH = (x_BLD @ (self.scale_D[:, None] * self.query_DH)).softmax(1)
        read_BHD = (share_BLH.transpose(1, 2) @ x_BLD - self.mean_D) * self.scale_D
        return self.classify(self.norm(self.value(read_BHD.flatten(1))))


def attentive_predict(
    x_NLD: np.ndarray,
    y_N: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
    device: torch.device | None = None,
) -> np.ndarray:
    """Labels of the tested samples by a probe trained on others, a function of `seed`.

    Args:
        x_NLD: frozen tokens, which may lie in a file.
        y_N: labels of any kind.
        train, test: numbers of samples.
    """
    classes, y_N = np.unique(y_N, return_inverse=True)
    if len(train) < 2:  # nothing to normalise by
        return np.repeat(classes[y_N[train]], len(test))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = AttentiveProbe(*_moments(x_NLD, train), len(classes)).to(device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        batches = _batches(train, seed)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches), pct_start=0.1)
        for rows in batches:
            scores_BC = probe(_tokens(x_NLD, rows, device))
            loss = F.cross_entropy(scores_BC, torch.from_numpy(y_N[rows]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    probe.eval()
    with torch.inference_mode():
        parts = [test[first : first + BATCH] for first in range(0, len(test), BATCH)]
        answers = [probe(_tokens(x_NLD, rows, device)).argmax(1).cpu().numpy() for rows in parts]
    return classes[np.concatenate(answers)]


def _batches(train: np.ndarray, seed: int) -> Sequence[np.ndarray]:
    """EPOCHS of batches of distinct samples, but not fewer nor more than the limits; each epoch in an order of its own."""
    draw, size = np.random.default_rng(seed), min(BATCH, len(train))
    per_epoch = len(train) // size
    steps = min(max(EPOCHS * per_epoch, LEAST_STEPS), MOST_STEPS)
    epochs = [draw.permutation(train) for _ in range(math.ceil(steps / per_epoch))]
    return [np.sort(order[i * size : (i + 1) * size]) for order in epochs for i in range(per_epoch)][:steps]


def _tokens(x_NLD: np.ndarray, rows: np.ndarray, device: torch.device | None) -> Tensor:
    return torch.from_numpy(x_NLD[rows]).to(device)


def _moments(x_NLD: np.ndarray, train: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature over the tokens of the training samples, (D,) each."""
    count, total_D, square_D = 0, 0.0, 0.0
    for first in range(0, len(train), BATCH):
        x_MD = x_NLD[train[first : first + BATCH]].reshape(-1, x_NLD.shape[-1]).astype(np.float64)
        count, total_D, square_D = count + len(x_MD), total_D + x_MD.sum(0), square_D + (x_MD**2).sum(0)
    mean_D = total_D / count
    deviation_D = np.sqrt(np.maximum(square_D / count - mean_D**2, 0))
    return torch.from_numpy(np.asarray(mean_D)).float(), torch.from_numpy(np.asarray(deviation_D)).float()
