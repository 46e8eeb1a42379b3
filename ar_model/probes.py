"""Frozen probes: predict labels from the features of a frozen network, with cross-validation.

Legend: N samples, M test samples, F features, B batch, L tokens, K of them before the tokens of the grid, D width, t time slices,
s tokens of a slice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor

from ar_model.attentive import DECAYS, EPOCHS, MIN_STEPS, attentive_predict
from ar_model.folds import Fold, left_out_groups
from ar_model.inputs import Grid
from ar_model.ridge import RidgeProbe

PROTOCOL = (
    "features: the mean token of each time slice, after the clip token if a network has one, concatenated and standardised; "
    "linear: a ridge classifier; knn: 20 nearest neighbours by cosine similarity; both use the layer (and penalty) with the best "
    "accuracy on left-out training clips; groups are left out as a whole, single clips where there are no groups, or where most "
    "classes have one group only"
)
"""Description of the linear and nearest-neighbour probes, for JSON and pages."""
ATTENTIVE = (
    "attentive: a learned query with 8 heads attends to all tokens and their positions, then batch normalisation without "
    f"parameters and a linear classifier; trained by AdamW for {EPOCHS} epochs (at least {MIN_STEPS} steps), on batches of 64 "
    f"clips that all folds share; layer and weight decay ({', '.join(f'{decay:g}' for decay in DECAYS)}) have the best accuracy "
    "on left-out parts of the training clips, which split no group"
)
"""Description of the attentive probe, for JSON and pages."""
_INNER, _LEFT_OUT = 5, 100
"""Parts of the training samples for the choice of an attentive probe, and number of samples that are enough to be left out."""
_TOGETHER = 20
"""Attentive probes that are trained at the same time; more need more memory."""


def slice_means(layer_BLD: Tensor, grid: Grid) -> Tensor:
    """Return the tokens before the grid and the mean token of each time slice, concatenated, (B, (K + t) * D), in fp32.

    `grid` is the number of tokens along (t, h, w), see `Objective.grid_of`. K = L - t * h * w.
    """
    leading_BKD, grid_BLD = layer_BLD.float().tensor_split([layer_BLD.shape[1] - math.prod(grid)], dim=1)
    means_BtD = rearrange(grid_BLD, "b (t s) d -> b t s d", t=grid[0]).mean(2)
    return torch.cat([leading_BKD, means_BtD], dim=1).flatten(1)


class NearestNeighbours:
    """Nearest training samples in cosine distance of standardised features, weighted by 1 / distance.

    `score` is the accuracy on the training samples without the neighbours of a sample's own group (see `RidgeProbe`).
    """

    def __init__(
        self, x_NF: np.ndarray, y_N: np.ndarray, groups_N: np.ndarray | None = None, neighbours: int = 20
    ) -> None:
        self.classes, self._label_N = np.unique(y_N, return_inverse=True)
        self._scaler, self._neighbours = StandardScaler().fit(x_NF), neighbours
        self._x_NF = normalize(self._scaler.transform(x_NF))
        groups_N, counts_N = left_out_groups(y_N, groups_N)
        self.score = float((self._vote(self._x_NF, groups_N, groups_N) == self._label_N)[counts_N].mean())

    def predict(self, x_MF: np.ndarray) -> np.ndarray:
        """Return the predicted labels (M,)."""
        x_MF = normalize(self._scaler.transform(x_MF))
        return self.classes[self._vote(x_MF, np.full(len(x_MF), -1), np.arange(len(self._x_NF)))]

    def _vote(self, x_MF: np.ndarray, own_M: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
        """Return the label numbers (M,) by the training samples whose group is not the sample's own group."""
        labels = []
        # Blocks of rows bound the memory.
        for rows in np.split(np.arange(len(x_MF)), range(1024, len(x_MF), 1024)):
            distance_MN = np.maximum(1 - x_MF[rows] @ self._x_NF.T, 1e-12)
            distance_MN[own_M[rows, None] == groups_N] = np.inf
            nearest_MK = distance_MN.argpartition(min(self._neighbours, len(groups_N)) - 1)[:, : self._neighbours]
            weight_MK = 1 / np.take_along_axis(distance_MN, nearest_MK, 1)
            votes_MC = weight_MK[:, None] @ (self._label_N[nearest_MK][..., None] == np.arange(len(self.classes)))
            labels.append(votes_MC[:, 0].argmax(1))
        return np.concatenate(labels)


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of one repetition (one set of folds). The tested samples are in increasing order.

    `chosen`: probe -> fold -> layer, counted from 1, with the best accuracy on left-out training samples.
    `best`: probe -> tested sample -> whether the prediction on the chosen layer is right.
    `predicted`: probe -> tested sample -> the label that is predicted on the chosen layer.
    `layers`: probe -> layer -> tested sample -> whether the prediction is right.
    """

    tested: list[int]
    chosen: dict[str, list[int]]
    best: dict[str, list[bool]]
    predicted: dict[str, list[Any]]
    layers: dict[str, list[list[bool]]]


def evaluate(
    layers_NF: Sequence[np.ndarray],
    y_N: np.ndarray,
    folds: Sequence[Fold],
    tokens_NLD: Sequence[np.ndarray] = (),
    grid: Grid = (1, 1, 1),
    device: torch.device | None = None,
) -> Outcomes:
    """Return the outcomes of the probes `linear` and `knn` on every layer, and of `attentive` if tokens are given.

    A sample counts once for each fold that tests it. `layers_NF` and `tokens_NLD` have one array per layer; tokens may be NumPy
    memmaps. `grid` (tokens along t, h and w, see `slice_means`) and `device` are for the attentive probe.
    """
    # Probe -> layer -> fold -> score on the training samples, and predicted labels of the test samples.
    scores: dict[str, list[list[float]]] = {"linear": [], "knn": []}
    predicted: dict[str, list[list[np.ndarray]]] = {"linear": [], "knn": []}
    for x_NF in layers_NF:
        for name, probe in (("linear", RidgeProbe), ("knn", NearestNeighbours)):
            fitted = [probe(x_NF[fold.train], y_N[fold.train], fold.groups_M) for fold in folds]
            scores[name].append([one.score for one in fitted])
            predicted[name].append([one.predict(x_NF[fold.test]) for one, fold in zip(fitted, folds, strict=True)])
    if tokens_NLD:
        per_layer = [_attentive(x_NLD, y_N, folds, grid, device) for x_NLD in tokens_NLD]
        scores["attentive"], predicted["attentive"] = map(list, zip(*per_layer, strict=True))
    tested_M = np.concatenate([fold.test for fold in folds])
    order_M = np.argsort(tested_M, kind="stable")

    def right(labels: Sequence[np.ndarray]) -> list[bool]:
        return (np.concatenate(labels) == y_N[tested_M])[order_M].tolist()

    def of_chosen(name: str) -> list[np.ndarray]:
        return [predicted[name][layer - 1][fold] for fold, layer in enumerate(chosen[name])]

    chosen = {name: (np.argmax(scores[name], axis=0) + 1).tolist() for name in scores}
    return Outcomes(
        tested_M[order_M].tolist(),
        chosen,
        {name: right(of_chosen(name)) for name in predicted},
        {name: np.concatenate(of_chosen(name))[order_M].tolist() for name in predicted},
        {name: [right(labels) for labels in predicted[name]] for name in predicted},
    )


def _attentive(
    x_NLD: np.ndarray, y_N: np.ndarray, folds: Sequence[Fold], grid: Grid, device: torch.device | None
) -> tuple[list[float], list[np.ndarray]]:
    """Return the score of an attentive probe on left-out training samples and its predictions for the test samples, by fold."""
    inner = [fold.inner(y_N, _INNER, 0, _LEFT_OUT) for fold in folds]
    # Probes for the choice and probes for the predictions are trained together, so that tokens are read once.
    tried = [
        (number, part, decay, part is fold)
        for number, fold in enumerate(folds)
        for part in (*inner[number], fold)
        for decay in DECAYS
    ]
    right_AF, count_AF = np.zeros((2, len(DECAYS), len(folds)))
    labels: dict[tuple[int, float], np.ndarray] = {}
    for first in range(0, len(tried), _TOGETHER):
        together = tried[first : first + _TOGETHER]
        _, parts, decays, _ = zip(*together, strict=True)
        predicted = attentive_predict(x_NLD, y_N, parts, decays, grid, device=device)
        for (number, part, decay, is_outer), found in zip(together, predicted, strict=True):
            if is_outer:
                labels[number, decay] = found
            else:
                right_AF[DECAYS.index(decay), number] += (found == y_N[part.test]).sum()
                count_AF[DECAYS.index(decay), number] += len(found)
    scores_AF = right_AF / np.maximum(count_AF, 1)
    chosen = [labels[number, DECAYS[best]] for number, best in enumerate(scores_AF.argmax(0))]
    return scores_AF.max(0).tolist(), chosen
