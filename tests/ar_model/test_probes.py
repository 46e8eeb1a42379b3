"""Frozen probes find signals; layers and penalties are chosen on training samples only, by leaving out whole groups."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ar_model.folds import Fold, make_folds
from ar_model.probes import NearestNeighbours, Outcomes, evaluate, slice_means


def nothing_held_out(n: int) -> np.ndarray:
    return np.zeros(n, dtype=bool)


def signal(y_N: np.ndarray, features: int = 8, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """Features that separate each class along one direction."""
    draw = np.random.default_rng(seed)
    return np.eye(features)[y_N] + noise * draw.standard_normal((len(y_N), features))


def noise(n: int, features: int = 8, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, features))


def accuracy(outcomes: Outcomes, probe: str) -> float:
    return float(np.mean(outcomes.best[probe]))


def test_slice_means_are_the_concatenated_mean_tokens_of_time_slices() -> None:
    layer = torch.randn(2, 12, 3).bfloat16()
    means = slice_means(layer, (4, 1, 3))
    assert means.shape == (2, 12) and means.dtype == torch.float32
    for t in range(4):
        assert torch.allclose(means[:, 3 * t : 3 * t + 3], layer.float()[:, 3 * t : 3 * t + 3].mean(1))


def test_tokens_before_the_grid_come_first_and_are_not_averaged() -> None:
    layer = torch.randn(2, 14, 3)
    means = slice_means(layer, (4, 1, 3))
    assert torch.equal(means[:, :6], layer[:, :2].flatten(1))
    assert torch.equal(means[:, 6:], slice_means(layer[:, 2:], (4, 1, 3)))


@pytest.mark.parametrize("samples", [8, 80])  # 8: fewer samples than neighbours
def test_nearest_neighbours_equal_those_of_scikit_learn(samples: int) -> None:
    y = np.arange(1200) % 4
    x = signal(y, noise=0.5)
    found = NearestNeighbours(x[:samples], y[:samples]).predict(x[80:])
    scaler = StandardScaler().fit(x[:samples])
    reference = KNeighborsClassifier(min(20, samples), metric="cosine", weights="distance")
    reference.fit(scaler.transform(x[:samples]), y[:samples])
    assert (found == reference.predict(scaler.transform(x[80:]))).all()
    assert (found == y[80:]).mean() > 0.5


def test_the_score_of_nearest_neighbours_ignores_those_of_the_own_group() -> None:
    y = np.arange(1200) % 4
    groups = np.arange(1200) // 8
    x = signal(y, noise=0.8)
    x += noise(150, 8, seed=3)[groups]
    scaled = StandardScaler().fit_transform(x)
    for groups_N, left_out in ((None, np.arange(1200)), (groups, groups), (y, np.arange(1200))):
        distances = 1 - (scaled @ scaled.T) / np.outer(*[np.linalg.norm(scaled, axis=1)] * 2)
        right = 0
        for row in range(1200):
            others = np.flatnonzero(left_out != left_out[row])
            nearest = others[np.argsort(distances[row, others])[:20]]
            right += np.bincount(y[nearest], 1 / distances[row, nearest]).argmax() == y[row]
        assert NearestNeighbours(x, y, groups_N).score == pytest.approx(right / 1200)


def test_evaluate_chooses_the_informative_layer_in_every_fold() -> None:
    y = np.arange(120) % 4
    folds = make_folds(y, [None] * 120, nothing_held_out(120), seed=0)
    outcomes = evaluate([noise(120), signal(y), noise(120, seed=2)], y, folds)
    assert outcomes.chosen == {"linear": [2] * 10, "knn": [2] * 10}
    assert outcomes.best["linear"] == outcomes.layers["linear"][1]
    assert accuracy(outcomes, "linear") > 0.9 and accuracy(outcomes, "knn") > 0.9
    assert max(np.mean(outcomes.layers["linear"][layer]) for layer in (0, 2)) < 0.5


def test_predicted_labels_are_those_that_are_right_or_wrong() -> None:
    y = np.array(["a", "b", "c"])[np.arange(60) % 3]
    x = signal(np.arange(60) % 3, noise=0.8)
    found = evaluate([x], y, make_folds(y, [None] * 60, nothing_held_out(60), 0))
    for probe in ("linear", "knn"):
        assert (np.array(found.predicted[probe]) == y[found.tested]).tolist() == found.best[probe]
        assert 0 < sum(found.best[probe]) < 60


def test_the_layer_is_chosen_on_training_samples_only() -> None:
    y = np.arange(160) % 4
    fold = Fold(np.arange(80), np.arange(80, 160))
    good_in_training, good_in_test = signal(y, noise=0.6), signal(y, noise=0.6)
    good_in_training[80:] = noise(80)
    good_in_test[:80] = noise(80)
    assert evaluate([good_in_test, good_in_training], y, [fold]).chosen == {"linear": [2], "knn": [2]}
    shuffled = y.copy()
    shuffled[80:] = np.random.default_rng(0).permutation(shuffled[80:])
    assert evaluate([good_in_test, good_in_training], shuffled, [fold]).chosen == {"linear": [2], "knn": [2]}


def test_evaluate_counts_a_sample_once_for_each_fold_that_tests_it() -> None:
    y = np.arange(100) % 2
    x = signal(y, noise=0.05)
    wrong = y.copy()
    wrong[:10] = 1 - wrong[:10]
    folds = [Fold(np.arange(50, 100), np.arange(0, 10)), Fold(np.arange(50, 100), np.arange(10, 40))]
    outcomes = evaluate([x], wrong, folds)
    right = [False] * 10 + [True] * 30
    assert outcomes.best["linear"] == outcomes.best["knn"] == outcomes.layers["linear"][0] == right
    assert outcomes.tested == list(range(40))
    reordered = [Fold(fold.train, fold.test[::-1]) for fold in folds[::-1]]
    assert evaluate([x], wrong, reordered) == outcomes


CLASSES, GROUPS, CLIPS = 8, 10, 7
CLASS = np.repeat(np.arange(CLASSES), GROUPS * CLIPS)
SCENE = np.repeat(np.arange(CLASSES * GROUPS), CLIPS)
NAMES = [f"scene {scene}" for scene in SCENE]


def layer(of_class: float, of_scene: float) -> np.ndarray:
    """Features that encode the class and the scene, with these strengths, (560, 512)."""
    draw = np.random.default_rng([int(100 * of_class), int(100 * of_scene)])
    classes, scenes = draw.standard_normal((CLASSES, 512)), draw.standard_normal((CLASSES * GROUPS, 512))
    noise = draw.standard_normal((len(CLASS), 512))
    return (of_class * classes[CLASS] + of_scene * scenes[SCENE] + noise).astype(np.float32)


@pytest.mark.parametrize("official", [False, True])
def test_a_layer_that_remembers_scenes_is_not_chosen(official: bool) -> None:
    """Each scene has one class, so a layer that encodes the scene predicts left-out clips, but not left-out scenes."""
    held_out = np.isin(SCENE % GROUPS, [0, 1, 2]) if official else nothing_held_out(len(CLASS))
    folds = make_folds(CLASS, NAMES, held_out, seed=0)
    outcomes = evaluate([layer(0, 1), layer(0.2, 0.6), layer(0.2, 0)], CLASS, folds)
    assert outcomes.chosen["linear"] == outcomes.chosen["knn"] == [3] * len(folds)
    assert accuracy(outcomes, "linear") > 0.9 > 0.4 > np.mean(outcomes.layers["linear"][0])


def test_the_attentive_probe_is_chosen_by_groups() -> None:
    """The layer that remembers scenes is worse than the layer of the class only if whole scenes are left out."""
    tokens = [np.repeat(x[:, None, :64], 2, axis=1) for x in (layer(0, 2), layer(1, 0))]
    (fold,) = make_folds(CLASS, NAMES, np.isin(SCENE % GROUPS, [0, 1, 2]), seed=0)
    outcomes = evaluate([x.mean(1) for x in tokens], CLASS, [fold], tokens, (2, 1, 1))
    assert outcomes.chosen["attentive"] == [2]
    assert outcomes.best["attentive"] == outcomes.layers["attentive"][1]
    assert accuracy(outcomes, "attentive") > 0.9 > 0.4 > np.mean(outcomes.layers["attentive"][0])


def test_a_layer_is_chosen_by_single_clips_if_each_class_is_one_group() -> None:
    y = np.repeat(np.arange(6), 20)
    held_out = np.arange(120) % 20 >= 14
    names = [f"class {label} {'test' if out else 'train'}" for label, out in zip(y, held_out, strict=True)]
    (fold,) = make_folds(y, names, held_out, seed=0)
    outcomes = evaluate([noise(120), signal(y, noise=0.1)], y, [fold])
    assert outcomes.chosen == {"linear": [2], "knn": [2]}
    assert accuracy(outcomes, "linear") == 1
