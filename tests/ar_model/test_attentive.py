"""The attentive probe finds what one token of many tells, and depends on nothing but its seed."""

import numpy as np
import pytest
import torch

from ar_model.attentive import AttentiveProbe, attentive_predict

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
    return attentive_predict(x_NLD, y_N, TRAIN, TEST, seed)


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
    answers = attentive_predict(x_NLD, np.arange(6) % 2, np.arange(4), np.arange(4, 6), seed=0)
    assert answers.shape == (2,) and set(answers) <= {0, 1}


def test_the_shares_of_a_head_are_those_of_attention_with_projected_keys() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(torch.zeros(16), torch.ones(16), classes=3).eval()
    x_BLD = torch.randn(2, 5, 16)
    heads = [(x_BLD @ probe.query_DH[:, h]).softmax(1) for h in range(8)]
    read = torch.cat([torch.einsum("bl,bld->bd", share, x_BLD) for share in heads], dim=1)
    assert torch.allclose(probe(x_BLD), probe.classify(probe.norm(probe.value(read))), atol=1e-5)
