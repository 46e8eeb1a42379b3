"""The ridge classifier equals scikit-learn's, and its left-out predictions equal those of models fitted without the group."""

import math

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV
from sklearn.preprocessing import StandardScaler

from ar_model.ridge import PENALTIES_A, RidgeProbe
from tests.ar_model.test_probes import noise, signal


def test_the_linear_probe_finds_a_linear_signal() -> None:
    y = np.arange(200) % 4
    x = np.hstack([1e-3 * signal(y), 1e3 * noise(200)])  # standardisation makes the weak signal as large as the noise
    probe = RidgeProbe(x[:150], y[:150])
    assert (probe.predict(x[150:]) == y[150:]).mean() > 0.9
    assert probe.score > 0.9


def test_the_linear_probe_is_at_chance_on_noise() -> None:
    y, x = np.arange(400) % 4, noise(400, 30)
    probe = RidgeProbe(x[:200], y[:200])
    spread = 4 * math.sqrt(0.25 * 0.75 / 200)
    assert abs((probe.predict(x[200:]) == y[200:]).mean() - 0.25) < spread
    assert abs(probe.score - 0.25) < spread  # leave-one-out accuracy; the training accuracy would be far higher


SHAPES = pytest.mark.parametrize(("samples", "features", "classes"), [(60, 150, 4), (90, 30, 4), (60, 150, 2)])


def data(samples: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.random.default_rng(2).integers(0, classes, samples)
    return noise(samples, features) + np.hstack([signal(y), np.zeros((samples, features - 8))]), y


@pytest.mark.parametrize(("samples", "features"), [(60, 150), (150, 40)])
def test_without_groups_it_equals_scikit_learn(samples: int, features: int) -> None:
    x, y = data(samples, features, 4)
    probe, scaler, test = RidgeProbe(x, y), StandardScaler().fit(x), noise(300, features, seed=5)
    reference = RidgeClassifierCV(alphas=PENALTIES_A, scoring="accuracy").fit(scaler.transform(x), y)
    assert probe.score == pytest.approx(reference.best_score_)
    assert (probe.predict(test) == reference.predict(scaler.transform(test))).all()


@pytest.mark.parametrize("single", [False, True])
@SHAPES
def test_the_score_is_the_accuracy_of_models_fitted_without_the_group(
    samples: int, features: int, classes: int, single: bool
) -> None:
    """With two classes, the score of scikit-learn 1.9 itself is always 1."""
    x, y = data(samples, features, classes)
    groups = np.arange(samples) if single else np.random.default_rng(3).integers(0, 12, samples)
    scaler, scores = StandardScaler().fit(x), []
    scaled, test = scaler.transform(x), noise(300, features, seed=5)
    for penalty in PENALTIES_A:
        right = 0
        for group in set(groups):
            out = groups == group
            model = RidgeClassifier(alpha=penalty).fit(scaled[~out], y[~out])
            right += (model.predict(scaled[out]) == y[out]).sum()
        scores.append(right / samples)
    probe = RidgeProbe(x, y, None if single else groups)
    assert probe.score == pytest.approx(max(scores))
    whole = RidgeClassifier(alpha=PENALTIES_A[np.argmax(scores)]).fit(scaled, y)
    assert (probe.predict(test) == whole.predict(scaler.transform(test))).all()


def test_groups_larger_than_the_rank_are_left_out_exactly() -> None:
    """The groups have 50 samples, the features rank 8."""
    y = np.arange(200) % 4
    x, groups = signal(y, noise=1.5), np.arange(200) // 50
    scaled, scores = StandardScaler().fit_transform(x), []
    for penalty in PENALTIES_A:
        models = [RidgeClassifier(alpha=penalty).fit(scaled[groups != g], y[groups != g]) for g in range(4)]
        scores.append(np.mean([model.predict(scaled[groups == g]) == y[groups == g] for g, model in enumerate(models)]))
    assert RidgeProbe(x, y, groups).score == pytest.approx(max(scores))


def test_if_each_class_is_one_group_single_samples_are_left_out() -> None:
    x, y = data(60, 150, 4)
    assert RidgeProbe(x, y, y).score == RidgeProbe(x, y).score


def test_constant_features_predict_the_most_common_class() -> None:
    probe = RidgeProbe(np.ones((9, 3)), np.array(["a"] * 5 + ["b"] * 4))
    assert probe.predict(np.ones((2, 3))).tolist() == ["a", "a"]
