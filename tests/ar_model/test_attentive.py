"""The attentive probe finds information in a single token, and is a function of its data and seed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar_model.attentive import AttentiveProbes, attentive_predict, schedule
from ar_model.folds import Fold
from ar_model.inputs import Grid
from ar_model.transformer import sincos_positions

GRID = (1, 4, 10)
TRAIN, TEST = np.arange(0, 160), np.arange(160, 240)


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and labels. One token per clip, at a random position, encodes the class. The mean over tokens hardly does."""
    draw = np.random.default_rng(0)
    y_N = draw.integers(0, 3, 240)
    x_NLD = draw.standard_normal((240, 40, 8))
    position_N = draw.integers(0, 40, 240)
    x_NLD[np.arange(240), position_N] = 0
    x_NLD[np.arange(240), position_N, 0] = 6
    x_NLD[np.arange(240), position_N, 1 + y_N] = 3
    return x_NLD.astype(np.float16), np.array(["walk", "run", "jump"])[y_N]


def predict(x_NLD: np.ndarray, y_N: np.ndarray, seed: int = 0) -> np.ndarray:
    return attentive_predict(x_NLD, y_N, [Fold(TRAIN, TEST)], [0.05], GRID, seed)[0]


def test_it_finds_the_token_that_encodes_the_class(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    assert (predict(x_NLD, y_N) == y_N[TEST]).mean() > 0.9


def test_it_depends_on_its_seed_and_not_on_the_global_generator(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    noise_N = np.random.default_rng(1).permutation(y_N)
    torch.manual_seed(7)
    first, random_numbers = predict(x_NLD, noise_N), torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), random_numbers)
    torch.manual_seed(8)
    assert (predict(x_NLD, noise_N) == first).all()
    assert (predict(x_NLD, noise_N, seed=1) != first).any()


def test_it_does_not_depend_on_the_labels_of_test_samples(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    other_N = y_N.copy()
    other_N[TEST] = "run"
    assert (predict(x_NLD, y_N) == predict(x_NLD, other_N)).all()


def test_it_is_invariant_to_scales_and_offsets_of_features(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    scaled_NLD = x_NLD.astype(np.float32) * 50 + 7
    assert (predict(scaled_NLD, y_N) == predict(x_NLD, y_N)).mean() > 0.95


def test_few_samples_and_a_constant_feature_give_predictions() -> None:
    x_NLD = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float16)
    x_NLD[..., 3] = 1
    folds = [Fold(np.arange(4), np.arange(4, 6)), Fold(np.arange(5, 6), np.arange(5))]
    few, one = attentive_predict(x_NLD, np.arange(6) % 2, folds, [0.05, 5], (1, 2, 2))
    assert few.shape == (2,) and set(few) <= {0, 1}
    assert one.tolist() == [1] * 5  # the label of its only training sample


def test_folds_do_not_leak_into_each_other(clips: tuple[np.ndarray, np.ndarray]) -> None:
    """Labels and tokens of a fold's test samples do not affect its predictions, though other folds train on them.

    Every batch holds all sixty samples, so that all runs have the same batches.
    """
    x_NLD, y_N = (part[:60] for part in clips)
    parts = np.array_split(np.arange(60), 4)
    folds = [Fold(np.setdiff1d(np.arange(60), test), test) for test in parts]
    predictions = attentive_predict(x_NLD, y_N, folds, [0.05] * 4, GRID)
    changed_N = y_N.copy()
    changed_N[parts[2]] = np.roll(y_N[parts[2]], 1)
    changed_predictions = attentive_predict(x_NLD, changed_N, folds, [0.05] * 4, GRID)
    assert (predictions[2] == changed_predictions[2]).all()
    assert any((a != b).any() for a, b in zip(predictions, changed_predictions, strict=True))
    outlier_NLD = x_NLD.copy()
    outlier_NLD[parts[2]] = 40
    test = np.arange(60, 100)
    predictions, changed_predictions = (
        attentive_predict(
            np.concatenate([tokens, clips[0][test]]),
            clips[1][:100],
            [Fold(folds[2].train, test), folds[1]],
            [0.05, 0.05],
            GRID,
        )
        for tokens in (x_NLD, outlier_NLD)
    )
    assert (predictions[0] == changed_predictions[0]).all()


@pytest.mark.parametrize("grid", [(2, 4, 5), (4, 3, 3), (1, 1, 1)])
def test_the_logits_of_a_fold_equal_pytorchs_own_layers(clips: tuple[np.ndarray, np.ndarray], grid: Grid) -> None:
    """Tokens before the grid have no position."""
    x_BLD = torch.from_numpy(clips[0][:20].astype(np.float32))
    torch.manual_seed(0)
    position_LD = F.pad(sincos_positions(grid, 8), (0, 0, 40 - math.prod(grid), 0))
    probes = AttentiveProbes(torch.zeros(2, 8), torch.ones(2, 8), grid, 40, classes=3)
    value, norm, classify = nn.Linear(64, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)
    with torch.no_grad():
        for fold_layers, layer in ((probes.value, value), (probes.classify, classify)):
            layer.weight.copy_(fold_layers.weight_FOI[1])
            layer.bias.copy_(fold_layers.bias_FO[1])
    trains_FB = torch.arange(20)[None] >= torch.tensor([[0], [6]])

    def pool(x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + position_LD
        weights = [(x_BLD @ probes.query_FDH[1, :, h]).softmax(1) for h in range(8)]
        return torch.cat([torch.einsum("bl,bld->bd", weight, x_BLD) for weight in weights], dim=1)

    logits_BC = classify(norm(value(pool(x_BLD[6:]))))
    assert torch.allclose(probes(x_BLD, trains_FB)[1, 6:], logits_BC, atol=1e-5)
    norm.eval()
    assert torch.allclose(probes(x_BLD)[1], classify(norm(value(pool(x_BLD)))), atol=1e-4)


def test_it_reads_the_order_of_time_slices() -> None:
    """The tokens of all classes are the same set; only their order in time differs."""
    draw = np.random.default_rng(0)
    y_N = draw.integers(0, 2, 240)
    x_NLD = 0.1 * draw.standard_normal((240, 30, 24))
    # A frozen network with few active features, so that the noise of a token does not hide its position.
    x_NLD[..., 2:] = 0
    # One marked token in the first slice and one in the last: in class 0, the first mark is the one in feature 0.
    x_NLD[np.arange(240), 20 * y_N, 0] += 3
    x_NLD[np.arange(240), 20 * (1 - y_N), 1] += 3
    for leading in (0, 1):
        tokens = np.concatenate([np.zeros((240, leading, 24)), x_NLD], axis=1)
        (labels,) = attentive_predict(tokens, y_N, [Fold(TRAIN, TEST)], [0.05], (3, 1, 10))
        assert (labels == y_N[TEST]).mean() > 0.95
    assert abs(np.corrcoef(x_NLD.mean(1)[:, 0], y_N)[0, 1]) < 0.2, (
        "the mean over tokens does not tell the classes apart"
    )


@pytest.mark.parametrize("samples", [10, 127, 255, 9000, 168_000])
def test_training_is_as_long_as_it_says(samples: int) -> None:
    steps, epochs = schedule(samples)
    assert epochs == steps * min(64, samples) / samples
    assert epochs >= 30 and steps >= 100
    assert epochs < 31 or steps == 100


def test_each_fold_has_its_own_weight_decay(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    folds = [Fold(TRAIN, TEST)] * 2
    both = attentive_predict(x_NLD, y_N, folds, [0.05, 100.0], GRID)
    assert (both[0] == y_N[TEST]).mean() > 0.9 > (both[1] == y_N[TEST]).mean()
