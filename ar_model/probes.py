"""Frozen evaluation: how much of a label can be read off features without changing them.

Legend: N samples, F features, B batch, L tokens, D width, t slices of time.
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
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ar_model.attentive import attentive_predict

PROTOCOL = (
    "mean token of each time slice, side by side; standardised; "
    "ridge classifier (penalty and layer by leave-one-out on training clips); 20 nearest by cosine"
)
ATTENTIVE = (
    "attentive: one learned query of 8 heads over all tokens, affine-free batch normalisation, linear classifier; "
    "30 epochs (100 to 400 steps) of AdamW, batches of 64 that all folds share, on the layer that the linear probe chose"
)
MOST_FOLDS = 10


def slice_means(layer_BLD: Tensor, slices: int) -> Tensor:
    """The mean token of each slice of time, side by side, (B, t * D), in fp32."""
    return rearrange(layer_BLD.float(), "b (t s) d -> b t s d", t=slices).mean(2).flatten(1)


@dataclass(frozen=True)
class Fold:
    """Sample numbers to train on and to test on."""

    train: np.ndarray
    test: np.ndarray


def make_folds(y_N: np.ndarray, groups: Sequence[str | None], held_out_N: np.ndarray, seed: int) -> list[Fold]:
    """How a labelled set is cut, as a function of the seed.

    - where samples are held out officially: those, and a random nine tenths of the others to train on;
    - else, where groups exist: up to ten folds that cut no group (each group its own fold if there are at most ten);
    - else: up to ten folds with equal shares of the classes.

    Raises:
        ValueError: if nothing can be held out.
    """
    if held_out_N.any():
        train = np.flatnonzero(~held_out_N)
        if len(train) == 0:
            raise ValueError("all labelled videos are held out: there is none to train a probe on")
        kept = np.random.default_rng(seed).permutation(len(train))[: max(1, round(0.9 * len(train)))]
        return [Fold(train[np.sort(kept)], np.flatnonzero(held_out_N))]
    if any(groups):
        named = np.array([group or f"sample {i}" for i, group in enumerate(groups)])
        parts = min(MOST_FOLDS, len(set(named)))
        if parts < 2:
            raise ValueError("all labelled videos are of one group: there is nothing to hold out")
        return [Fold(*cut) for cut in GroupKFold(parts, shuffle=True, random_state=seed).split(y_N, y_N, named)]
    parts = min(MOST_FOLDS, min(Counter(y_N).values()))
    if parts < 2:
        raise ValueError("a class has one video only: there is nothing to hold out")
    return [Fold(*cut) for cut in StratifiedKFold(parts, shuffle=True, random_state=seed).split(y_N, y_N)]


def folds_in_words(folds: int) -> str:
    """What was tested, as `make_folds` cuts it."""
    return "the official held-out split" if folds == 1 else f"{folds} folds, by groups where the videos have them"


class LinearProbe:
    """A ridge classifier on standardised features.

    Its penalty is the one with the best leave-one-out accuracy on the training samples, which has a closed form;
    `score` is that accuracy, so that a layer can be chosen without a look at held-out samples.
    """

    def __init__(self, x_NF: np.ndarray, y_N: np.ndarray) -> None:
        self._scale = StandardScaler().fit(x_NF)
        self._ridge = RidgeClassifierCV(alphas=10.0 ** np.arange(-1, 7), scoring="accuracy").fit(
            self._scale.transform(x_NF), y_N
        )
        self.score = float(self._ridge.best_score_)

    def predict(self, x_NF: np.ndarray) -> np.ndarray:
        return self._ridge.predict(self._scale.transform(x_NF))


def knn_predict(x_NF: np.ndarray, y_N: np.ndarray, test_MF: np.ndarray, neighbours: int = 20) -> np.ndarray:
    """Labels of the nearest training samples by cosine of standardised features, weighted by closeness."""
    scale = StandardScaler().fit(x_NF)
    knn = KNeighborsClassifier(min(neighbours, len(x_NF)), metric="cosine", weights="distance")
    return knn.fit(scale.transform(x_NF), y_N).predict(scale.transform(test_MF))


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one repetition over all its folds, by each kind of probe."""

    chosen: list[int]
    """Layer with the best linear probe on the training samples of each fold, counted from 1."""
    best: dict[str, float]
    """Probe -> accuracy of the chosen layers."""
    layers: dict[str, list[float]]
    """Probe -> accuracy of each layer, first to last."""


def evaluate(
    layers_NF: Sequence[np.ndarray],
    y_N: np.ndarray,
    folds: Sequence[Fold],
    tokens_NLD: Sequence[np.ndarray] = (),
    device: torch.device | None = None,
) -> Accuracy:
    """Probe every layer in every fold, `linear` and `knn`, and given its tokens `attentive` too.

    A sample counts once for each fold that tests it.
    """
    right: dict[str, list[list[np.ndarray]]] = {}
    chosen = []
    for fold in folds:
        wanted_M, scores = y_N[fold.test], []
        for i, x in enumerate(layers_NF):
            x_train, x_test, y_train = x[fold.train], x[fold.test], y_N[fold.train]
            linear = LinearProbe(x_train, y_train)
            scores.append(linear.score)
            answers = {"linear": linear.predict(x_test), "knn": knn_predict(x_train, y_train, x_test)}
            for probe, answer in answers.items():
                right.setdefault(probe, [[] for _ in layers_NF])[i].append(answer == wanted_M)
        chosen.append(scores.index(max(scores)) + 1)
    for x_NLD in tokens_NLD:
        found = attentive_predict(x_NLD, y_N, [(fold.train, fold.test) for fold in folds], device=device)
        answered = [answer == y_N[fold.test] for answer, fold in zip(found, folds, strict=True)]
        right.setdefault("attentive", []).append(answered)
    return Accuracy(
        chosen,
        {probe: _mean([layers[i - 1][fold] for fold, i in enumerate(chosen)]) for probe, layers in right.items()},
        {probe: [_mean(layer) for layer in layers] for probe, layers in right.items()},
    )


def _mean(right: Sequence[np.ndarray]) -> float:
    return float(np.concatenate(right).mean())


def chance(y_N: np.ndarray, folds: Sequence[Fold]) -> float:
    """Accuracy of always naming the class that is commonest among the tested samples: no constant answer does better."""
    tested = np.concatenate([y_N[fold.test] for fold in folds])
    return Counter(tested).most_common(1)[0][1] / len(tested)
