"""Frozen probes: folds do not leak, layers are chosen on training samples only, and standard errors are correct."""

import math

import numpy as np
import pytest
import torch

from ar_model.probes import Fold, LinearProbe, chance, evaluate, knn_predict, make_folds, slice_means
from pipelines.evaluation.errors import accuracy_with_error


def nothing_held_out(n: int) -> np.ndarray:
    return np.zeros(n, dtype=bool)


def signal(y_N: np.ndarray, features: int = 8, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """Features that separate each class along one direction."""
    draw = np.random.default_rng(seed)
    return np.eye(features)[y_N] + noise * draw.standard_normal((len(y_N), features))


def noise(n: int, features: int = 8, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, features))


def assert_partition(folds: list[Fold], n: int) -> None:
    """Assert that every sample is tested in one fold and trained on in all others."""
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(n))
    for fold in folds:
        assert sorted(np.concatenate([fold.train, fold.test])) == list(range(n))


def test_slice_means_are_the_concatenated_mean_tokens_of_time_slices() -> None:
    layer = torch.randn(2, 12, 3).bfloat16()
    means = slice_means(layer, 4)
    assert means.shape == (2, 12) and means.dtype == torch.float32
    for t in range(4):
        assert torch.allclose(means[:, 3 * t : 3 * t + 3], layer.float()[:, 3 * t : 3 * t + 3].mean(1))


def test_an_official_split_is_tested_completely_and_nine_tenths_of_the_rest_train() -> None:
    held_out = np.arange(50) % 5 == 0
    (fold,) = make_folds(np.arange(50) % 2, ["a"] * 50, held_out, seed=0)
    assert fold.test.tolist() == np.flatnonzero(held_out).tolist()
    assert len(set(fold.train)) == len(fold.train) == 36
    assert not held_out[fold.train].any()
    trains = [make_folds(np.arange(50) % 2, [None] * 50, held_out, seed)[0].train.tolist() for seed in range(4)]
    assert len({tuple(train) for train in trains}) == 4


@pytest.mark.parametrize("groups_N, folds_N", [(4, 4), (10, 10), (23, 10)])
def test_folds_never_split_a_group(groups_N: int, folds_N: int) -> None:
    n = 120
    groups = np.array([f"g{i % groups_N}" for i in range(n)])
    folds = make_folds(np.arange(n) % 3, groups.tolist(), nothing_held_out(n), seed=3)
    assert len(folds) == folds_N
    assert_partition(folds, n)
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])


def test_samples_without_a_group_are_groups_of_their_own() -> None:
    groups = ["a"] * 10 + [None] * 10
    folds = make_folds(np.arange(20) % 2, groups, nothing_held_out(20), seed=0)
    assert_partition(folds, 20)
    group = set(range(10))
    assert all(len(group & set(fold.test)) in (0, 10) for fold in folds)
    assert any(0 < len(set(fold.test) - group) < 10 for fold in folds)


def test_folds_without_groups_are_stratified() -> None:
    y = np.array([0] * 50 + [1] * 30 + [2] * 20)
    folds = make_folds(y, [None] * 100, nothing_held_out(100), seed=0)
    assert len(folds) == 10
    assert_partition(folds, 100)
    assert all(np.bincount(y[fold.test]).tolist() == [5, 3, 2] for fold in folds)


def test_the_rarest_class_limits_the_number_of_folds() -> None:
    y = np.array([0] * 20 + [1] * 3)
    folds = make_folds(y, [None] * 23, nothing_held_out(23), seed=0)
    assert len(folds) == 3
    assert all((y[fold.test] == 1).sum() == 1 for fold in folds)


@pytest.mark.parametrize("groups", [[None] * 60, [f"g{i % 20}" for i in range(60)]])
def test_folds_are_a_function_of_the_seed(groups: list[str | None]) -> None:
    def tests(seed: int) -> list[list[int]]:
        return [fold.test.tolist() for fold in make_folds(np.arange(60) % 2, groups, nothing_held_out(60), seed)]

    assert tests(5) == tests(5)
    assert tests(5) != tests(6)


def test_nothing_to_hold_out_is_refused() -> None:
    y = np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match="held-out split"):
        make_folds(y, [None] * 4, np.ones(4, dtype=bool), seed=0)
    with pytest.raises(ValueError, match="one group"):
        make_folds(y, ["a"] * 4, nothing_held_out(4), seed=0)
    with pytest.raises(ValueError, match="a class has one labelled video"):
        make_folds(np.array([0, 0, 1]), [None] * 3, nothing_held_out(3), seed=0)


def test_the_linear_probe_finds_a_linear_signal() -> None:
    y = np.arange(200) % 4
    x = np.hstack([1e-3 * signal(y), 1e3 * noise(200)])  # standardisation makes the weak signal as large as the noise
    probe = LinearProbe(x[:150], y[:150])
    assert (probe.predict(x[150:]) == y[150:]).mean() > 0.9
    assert probe.score > 0.9


def test_the_linear_probe_is_at_chance_on_noise() -> None:
    y, x = np.arange(400) % 4, noise(400, 30)
    probe = LinearProbe(x[:200], y[:200])
    spread = 4 * math.sqrt(0.25 * 0.75 / 200)
    assert abs((probe.predict(x[200:]) == y[200:]).mean() - 0.25) < spread
    assert abs(probe.score - 0.25) < spread  # leave-one-out accuracy; the training accuracy would be far higher


def test_nearest_neighbours_find_a_signal_also_from_few_samples() -> None:
    y = np.arange(120) % 4
    x = signal(y, noise=0.2)
    assert (knn_predict(x[:80], y[:80], x[80:]) == y[80:]).mean() > 0.9
    assert (knn_predict(x[:8], y[:8], x[80:]) == y[80:]).mean() > 0.5  # fewer samples than neighbours


def test_evaluate_chooses_the_informative_layer_in_every_fold() -> None:
    y = np.arange(120) % 4
    folds = make_folds(y, [None] * 120, nothing_held_out(120), seed=0)
    accuracy = evaluate([noise(120), signal(y), noise(120, seed=2)], y, folds)
    assert accuracy.chosen == [2] * 10
    assert accuracy.best["linear"] == accuracy.layers["linear"][1] > 0.9
    assert max(accuracy.layers["linear"][0], accuracy.layers["linear"][2]) < 0.5
    assert accuracy.best["knn"] > 0.9


def test_the_layer_is_chosen_on_training_samples_only() -> None:
    y = np.arange(160) % 4
    fold = Fold(np.arange(80), np.arange(80, 160))
    good_in_training, good_in_test = signal(y, noise=0.6), signal(y, noise=0.6)
    good_in_training[80:] = noise(80)
    good_in_test[:80] = noise(80)
    assert evaluate([good_in_test, good_in_training], y, [fold]).chosen == [2]
    shuffled = y.copy()
    shuffled[80:] = np.random.default_rng(0).permutation(shuffled[80:])
    assert evaluate([good_in_test, good_in_training], shuffled, [fold]).chosen == [2]


def test_evaluate_counts_a_sample_once_for_each_fold_that_tests_it() -> None:
    y = np.arange(100) % 2
    x = signal(y, noise=0.05)
    wrong = y.copy()
    wrong[:10] = 1 - wrong[:10]
    folds = [Fold(np.arange(50, 100), np.arange(0, 10)), Fold(np.arange(50, 100), np.arange(10, 40))]
    accuracy = evaluate([x], wrong, folds)
    assert accuracy.best["linear"] == accuracy.best["knn"] == accuracy.layers["linear"][0] == 0.75


def test_the_standard_error_adds_the_variances_of_samples_and_repetitions() -> None:
    accuracies, tested = [0.7, 0.8, 0.75], 400
    mean = 0.75
    repeated = sum((a - mean) ** 2 for a in accuracies) / 2 / 3
    found = accuracy_with_error(accuracies, tested)
    assert found["mean"] == pytest.approx(mean, abs=5e-5)
    assert found["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / tested + repeated), abs=5e-5)


def test_a_single_repetition_has_the_binomial_error() -> None:
    assert accuracy_with_error([0.5], 100) == {"mean": 0.5, "stderr": 0.05}
    assert accuracy_with_error([1.0, 1.0], 100) == {"mean": 1.0, "stderr": 0.0}


def test_chance_is_the_accuracy_of_the_best_constant_prediction() -> None:
    """It does not depend on the folds. (Always predicting the most common class of the training samples would score 0 here.)"""
    y_N = np.array(["a", "a", "b", "b"])
    folds = [Fold(np.array([1, 2, 3]), np.array([0])), Fold(np.array([0, 1, 2]), np.array([3]))]
    folds += [Fold(np.array([0, 2, 3]), np.array([1])), Fold(np.array([0, 1, 3]), np.array([2]))]
    assert chance(y_N, folds) == 0.5
    assert chance(np.array(["a", "b", "b", "b"]), folds) == 0.75
    assert chance(np.array(["a", "b", "b", "a"]), [Fold(np.array([0, 1]), np.array([2, 3]))]) == 0.5
