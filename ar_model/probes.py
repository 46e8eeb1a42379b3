"""Frozen probes: predict labels from the features of a frozen network, with cross-validation.

Legend: N samples, M test samples, F features, B batch, L tokens, D width, t time slices.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ar_model.attentive import Fold, attentive_predict

PROTOCOL = (
    "features: the mean token of each time slice, concatenated and standardised; linear: a ridge classifier, whose penalty and "
    "layer have the best leave-one-out accuracy on the training clips; knn: 20 nearest neighbours by cosine similarity"
)
"""Description of the linear and nearest-neighbour probes, for JSON and pages."""
ATTENTIVE = (
    "attentive: a learned query with 8 heads attends to all tokens, then batch normalisation without parameters and a linear "
    "classifier; trained for 30 epochs (100 to 400 steps) by AdamW, on batches of 64 clips that all folds share; on the layer "
    "that the linear probe chose"
)
"""Description of the attentive probe, for JSON and pages."""
MAX_FOLDS = 10


def slice_means(layer_BLD: Tensor, slices: int) -> Tensor:
    """Return the mean token of each time slice, concatenated, (B, t * D), in fp32."""
    return rearrange(layer_BLD.float(), "b (t s) d -> b t s d", t=slices).mean(2).flatten(1)


def make_folds(y_N: np.ndarray, groups: Sequence[str | None], held_out_N: np.ndarray, seed: int) -> list[Fold]:
    """Split labelled samples into folds, as a function of the seed.

    - With an official held-out split: one fold. It tests on that split and trains on a random 90 % of the other samples.
    - Else, with groups: ten folds that keep each group together, or one fold per group if there are fewer groups.
    - Else: up to ten stratified folds.

    Raises a ValueError if nothing can be held out, or nothing is left to train on.
    """
    if held_out_N.any():
        train = np.flatnonzero(~held_out_N)
        if len(train) == 0:
            raise ValueError("all labelled videos are in the held-out split: none is left to train a probe on")
        kept = np.random.default_rng(seed).permutation(len(train))[: max(1, round(0.9 * len(train)))]
        return [Fold(train[np.sort(kept)], np.flatnonzero(held_out_N))]
    if any(groups):
        # A sample without a group is a group of its own.
        names = np.array([group or f"sample {i}" for i, group in enumerate(groups)])
        count = min(MAX_FOLDS, len(set(names)))
        if count < 2:
            raise ValueError("all labelled videos are in one group: nothing can be held out")
        splits = GroupKFold(count, shuffle=True, random_state=seed).split(y_N, y_N, names)
    else:
        count = min(MAX_FOLDS, *Counter(y_N).values())
        if count < 2:
            raise ValueError("a class has one labelled video only: nothing can be held out")
        splits = StratifiedKFold(count, shuffle=True, random_state=seed).split(y_N, y_N)
    return [Fold(train, test) for train, test in splits]


def folds_in_words(folds: int) -> str:
    """Return a description of the test samples, given the number of folds from `make_folds`."""
    return "the official held-out split" if folds == 1 else f"{folds} folds, which split no group if there are groups"


class LinearProbe:
    """Ridge classifier on standardised features.

    The penalty is the one with the best leave-one-out accuracy on the training samples, which has a closed form. `score` is that
    accuracy. It allows choosing a layer without held-out samples.
    """

    def __init__(self, x_NF: np.ndarray, y_N: np.ndarray) -> None:
        ridge = RidgeClassifierCV(alphas=10.0 ** np.arange(-1, 7), scoring="accuracy")
        self._model = make_pipeline(StandardScaler(), ridge).fit(x_NF, y_N)
        self.score = float(ridge.best_score_)

    def predict(self, x_NF: np.ndarray) -> np.ndarray:
        return self._model.predict(x_NF)


def knn_predict(x_NF: np.ndarray, y_N: np.ndarray, test_MF: np.ndarray, neighbours: int = 20) -> np.ndarray:
    """Predict labels by the nearest training samples in cosine distance of standardised features, weighted by 1 / distance."""
    knn = KNeighborsClassifier(min(neighbours, len(x_NF)), metric="cosine", weights="distance")
    return make_pipeline(StandardScaler(), knn).fit(x_NF, y_N).predict(test_MF)


@dataclass(frozen=True)
class Accuracy:
    """Accuracies of one repetition (one set of folds)."""

    chosen: list[int]
    """Fold -> layer, counted from 1, whose linear probe has the best `score`."""
    best: dict[str, float]
    """Probe -> accuracy on the chosen layers."""
    layers: dict[str, list[float]]
    """Probe -> accuracy on each layer, first to last."""


def evaluate(
    layers_NF: Sequence[np.ndarray],
    y_N: np.ndarray,
    folds: Sequence[Fold],
    tokens_NLD: Sequence[np.ndarray] = (),
    device: torch.device | None = None,
) -> Accuracy:
    """Return the accuracies of the probes `linear` and `knn` on every layer, and of `attentive` if tokens are given.

    A sample counts once for each fold that tests it. `layers_NF` and `tokens_NLD` have one array per layer; tokens may be NumPy
    memmaps. `device` is for the attentive probe.
    """
    # Probe -> layer -> fold -> predicted labels of the test samples.
    predicted: dict[str, list[list[np.ndarray]]] = {"linear": [], "knn": []}
    scores = []
    for x_NF in layers_NF:
        linear = [LinearProbe(x_NF[train], y_N[train]) for train, _ in folds]
        scores.append([probe.score for probe in linear])
        predicted["linear"].append([probe.predict(x_NF[test]) for probe, (_, test) in zip(linear, folds, strict=True)])
        predicted["knn"].append([knn_predict(x_NF[train], y_N[train], x_NF[test]) for train, test in folds])
    if tokens_NLD:
        predicted["attentive"] = [attentive_predict(x_NLD, y_N, folds, device=device) for x_NLD in tokens_NLD]
    chosen = (np.argmax(scores, axis=0) + 1).tolist()
    y_tested = np.concatenate([y_N[test] for _, test in folds])
    best, layers = {}, {}
    for probe, layer_folds in predicted.items():
        best[probe] = _accuracy([layer_folds[layer - 1][fold] for fold, layer in enumerate(chosen)], y_tested)
        layers[probe] = [_accuracy(labels, y_tested) for labels in layer_folds]
    return Accuracy(chosen, best, layers)


def _accuracy(labels: Sequence[np.ndarray], y_tested: np.ndarray) -> float:
    return float((np.concatenate(labels) == y_tested).mean())


def chance(y_N: np.ndarray, folds: Sequence[Fold]) -> float:
    """Return the accuracy of the best constant prediction: the share of the most common class among the test samples."""
    y_tested = np.concatenate([y_N[test] for _, test in folds])
    return Counter(y_tested).most_common(1)[0][1] / len(y_tested)
