"""The attentive probe finds what one token of many tells, and depends on nothing but its seed."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ar_model.attentive import AttentiveProbes, attentive_predict

TRAIN, TEST = np.arange(0, 160), np.arange(160, 240)


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of which one, anywhere, is marked by its first feature and tells the class by the others: their mean hardly does."""
    draw = np.random.default_rng(0)
    y_N = draw.integers(0, 3, 240)
    x_NLD = draw.standard_normal((240, 40, 8))
    where = draw.integers(0, 40, 240)
    x_NLD[np.arange(240), where] = 0
    x_NLD[np.arange(240), where, 0] = 6
    x_NLD[np.arange(240), where, 1 + y_N] = 3
    return x_NLD.astype(np.float16), np.array(["walk", "run", "jump"])[y_N]


def predict(x_NLD: np.ndarray, y_N: np.ndarray, seed: int = 0) -> np.ndarray:
    return attentive_predict(x_NLD, y_N, [(TRAIN, TEST)], seed)[0]


def test_it_reads_the_token_that_tells(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    assert (predict(x_NLD, y_N) == y_N[TEST]).mean() > 0.9


def test_it_says_what_its_seed_says_and_leaves_others_randomness_alone(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    noise_N = np.random.default_rng(1).permutation(y_N)
    torch.manual_seed(7)
    first, drawn = predict(x_NLD, noise_N), torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(8)
    assert (predict(x_NLD, noise_N) == first).all()
    assert (predict(x_NLD, noise_N, seed=1) != first).any()


def test_it_never_sees_the_labels_of_what_it_is_tested_on(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    other_N = y_N.copy()
    other_N[TEST] = "run"
    assert (predict(x_NLD, y_N) == predict(x_NLD, other_N)).all()


def test_scales_and_offsets_of_features_change_nothing(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_NLD, y_N = clips
    scaled_NLD = x_NLD.astype(np.float32) * 50 + 7
    assert (predict(scaled_NLD, y_N) == predict(x_NLD, y_N)).mean() > 0.95


def test_few_samples_and_a_constant_feature_give_an_answer() -> None:
    x_NLD = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float16)
    x_NLD[..., 3] = 1
    folds = [(np.arange(4), np.arange(4, 6)), (np.arange(5, 6), np.arange(5))]
    few, one = attentive_predict(x_NLD, np.arange(6) % 2, folds)
    assert few.shape == (2,) and set(few) <= {0, 1}
    assert one.tolist() == [1] * 5  # the only class that it knows


def test_folds_learn_nothing_of_each_other(clips: tuple[np.ndarray, np.ndarray]) -> None:
    """Sixty samples, of which every batch has all: a fold's answers are then the same whatever it tests beside the others."""
    x_NLD, y_N = (part[:60] for part in clips)
    parts = np.array_split(np.arange(60), 4)
    folds = [(np.setdiff1d(np.arange(60), test), test) for test in parts]
    answers = attentive_predict(x_NLD, y_N, folds)
    other_N = y_N.copy()
    other_N[parts[2]] = np.roll(y_N[parts[2]], 1)
    others = attentive_predict(x_NLD, other_N, folds)
    assert (answers[2] == others[2]).all()
    assert any((mine != other).any() for mine, other in zip(answers, others, strict=True))
    strange_NLD = x_NLD.copy()
    strange_NLD[parts[2]] = 40
    asked = np.arange(60, 100)  # the same beside both
    answers, others = (
        attentive_predict(np.concatenate([tokens, clips[0][asked]]), clips[1][:100], [(folds[2][0], asked), folds[1]])
        for tokens in (x_NLD, strange_NLD)
    )
    assert (answers[0] == others[0]).all()


def test_a_fold_s_scores_are_those_of_pytorch_s_own_layers(clips: tuple[np.ndarray, np.ndarray]) -> None:
    x_BLD = torch.from_numpy(clips[0][:20].astype(np.float32))
    torch.manual_seed(0)
    probes = AttentiveProbes(torch.zeros(2, 8), torch.ones(2, 8), classes=3)
    value, norm, classify = nn.Linear(64, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)
    with torch.no_grad():
        for mine, layer in ((probes.value, value), (probes.classify, classify)):
            layer.weight.copy_(mine.weight_FOI[1])
            layer.bias.copy_(mine.bias_FO[1])
    counts_FB = torch.arange(20)[None] >= torch.tensor([[0], [6]])

    def read(x_BLD: Tensor) -> Tensor:
        heads = [(x_BLD @ probes.query_FDH[1, :, h]).softmax(1) for h in range(8)]
        return torch.cat([torch.einsum("bl,bld->bd", share, x_BLD) for share in heads], dim=1)

    scores_BC = classify(norm(value(read(x_BLD[6:]))))
    assert torch.allclose(probes(x_BLD, counts_FB)[1, 6:], scores_BC, atol=1e-5)
    norm.eval()
    assert torch.allclose(probes(x_BLD)[1], classify(norm(value(read(x_BLD)))), atol=1e-4)
