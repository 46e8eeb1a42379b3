"""Every likelihood of codes sums to one, and the pixel loss has VideoMAE's normalised target."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ar_model.inputs import CodeSpec, Patching
from ar_model.targets import CodeTarget, PixelTarget, make_target

LEVELS = (3, 4)
DIGITS = CodeSpec(shape=(2, 2, 2), vocab_size=12, levels=(LEVELS,))
CODEBOOK = CodeSpec(
    shape=(2, 2, 2), vocab_size=12, codebook_VC=torch.randn(12, 4, generator=torch.Generator().manual_seed(5))
)
PLAIN = CodeSpec(shape=(2, 2, 2), vocab_size=12)
LIKELIHOODS = [("joint", DIGITS), ("joint", CODEBOOK), ("joint", PLAIN), ("digits", DIGITS)]


def code_target(spec: CodeSpec, codes_per_token: int, likelihood: str) -> CodeTarget:
    """Build a target with large random weights; the initial weights predict almost uniformly."""
    torch.manual_seed(0)
    target = CodeTarget(spec, 6, codes_per_token, likelihood)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in target.parameters():
            p.add_(torch.randn_like(p))
    return target


def nats(target: CodeTarget, h_D: Tensor, codes: tuple[int, ...]) -> Tensor:
    """Return the nats of all codes of one token together."""
    loss = target(h_D[None, None], torch.tensor(codes)[None, None])
    assert loss.shape == () and loss.dtype == torch.float32
    return loss.double() * len(codes)


@torch.no_grad()
@pytest.mark.parametrize("codes_per_token", [1, 2])
@pytest.mark.parametrize("likelihood, spec", LIKELIHOODS)
def test_the_likelihood_sums_to_one_over_all_values_of_a_token(
    likelihood: str, spec: CodeSpec, codes_per_token: int
) -> None:
    target = code_target(spec, codes_per_token, likelihood)
    for h_D in torch.randn(3, 6):
        every = torch.stack(
            [nats(target, h_D, codes) for codes in itertools.product(range(12), repeat=codes_per_token)]
        )
        assert torch.exp(-every).sum().item() == pytest.approx(1, abs=1e-4)
        assert every.std() > 0.1  # not uniform


@torch.no_grad()
@pytest.mark.parametrize("likelihood, spec", LIKELIHOODS)
def test_the_loss_is_the_mean_over_codes(likelihood: str, spec: CodeSpec) -> None:
    target = code_target(spec, 2, likelihood)
    h_BLD, codes_BLP = torch.randn(2, 5, 6), torch.randint(0, 12, (2, 5, 2))
    per_token = [nats(target, h_BLD[b, i], tuple(codes_BLP[b, i].tolist())) for b in range(2) for i in range(5)]
    assert target(h_BLD, codes_BLP).item() == pytest.approx(sum(per_token).item() / 20, rel=1e-5)
    h_D = h_BLD[0, 0]
    # The codes of a token are independent given the context.
    for a, b in itertools.product(range(12), repeat=2):
        mixed = nats(target, h_D, (a, 0)) + nats(target, h_D, (0, b))
        assert torch.isclose(nats(target, h_D, (a, b)) + nats(target, h_D, (0, 0)), mixed, atol=1e-5)


@pytest.mark.parametrize("likelihood, spec", LIKELIHOODS)
def test_the_gradient_of_a_token_depends_on_its_own_codes_only(likelihood: str, spec: CodeSpec) -> None:
    target = code_target(spec, 2, likelihood)
    h_BLD, codes_BLP = torch.randn(2, 3, 6, requires_grad=True), torch.randint(0, 11, (2, 3, 2))
    (before,) = torch.autograd.grad(target(h_BLD, codes_BLP), h_BLD)
    codes_BLP[1, 2, 0] += 1
    (after,) = torch.autograd.grad(target(h_BLD, codes_BLP), h_BLD)
    assert (before != after).any(-1).nonzero().tolist() == [[1, 2]]


@torch.no_grad()
def test_digits_of_a_code_are_independent_given_the_context() -> None:
    target = code_target(DIGITS, 1, "digits")
    h_D = torch.randn(6)
    every = torch.stack([nats(target, h_D, (code,)) for code in range(12)]).view(4, 3)
    assert torch.allclose(every - every[:1], (every - every[:1])[:, :1].expand(4, 3), atol=1e-5)
    joint = torch.stack([nats(code_target(DIGITS, 1, "joint"), h_D, (code,)) for code in range(12)]).view(4, 3)
    assert not torch.allclose(joint - joint[:1], (joint - joint[:1])[:, :1].expand(4, 3), atol=1e-2)


@pytest.mark.parametrize("spec", [CODEBOOK, PLAIN])
def test_likelihood_digits_is_refused_for_codes_without_digits(spec: CodeSpec) -> None:
    with pytest.raises(ValueError, match="digits"):
        CodeTarget(spec, 6, likelihood="digits")


def videomae_target(pixels_BLPC: np.ndarray) -> np.ndarray:
    """Normalise pixels in [0, 1] by mean and unbiased standard deviation (plus 1e-6) of each channel of each tubelet."""
    x = pixels_BLPC.astype(np.float64) / 255
    target = np.empty_like(x)
    for b, i, channel in itertools.product(*(range(x.shape[axis]) for axis in (0, 1, 3))):
        values = x[b, i, :, channel]
        mean = values.sum() / len(values)
        std = math.sqrt(((values - mean) ** 2).sum() / (len(values) - 1))
        target[b, i, :, channel] = (values - mean) / (std + 1e-6)
    return target


@pytest.mark.parametrize("tubelet", [(2, 4, 4), (1, 2, 1)])
def test_the_pixel_loss_is_the_error_to_videomaes_normalised_target(tubelet: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    target, size = PixelTarget(6, tubelet), math.prod(tubelet)
    h_BLD = torch.randn(2, 5, 6)
    pixels_BLPC = torch.randint(0, 256, (2, 5, size, 3), dtype=torch.uint8)
    pixels_BLPC[..., 1] = 100 + pixels_BLPC[..., 1] // 64  # a channel of low contrast weighs as much as the others
    predicted = target.head(h_BLD).detach().double().numpy().reshape(2, 5, size, 3)
    expected = ((predicted - videomae_target(pixels_BLPC.numpy())) ** 2).mean()
    loss = target(h_BLD, pixels_BLPC)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss = target(h_BLD, pixels_BLPC)
    assert autocast_loss.dtype == torch.float32
    assert autocast_loss.item() == pytest.approx(expected, rel=2e-2)


def test_a_perfect_prediction_has_no_loss() -> None:
    """The head's outputs have the order of pixels and channels in the clip."""
    pixels_BLPC = torch.randint(0, 256, (1, 1, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = PixelTarget(4, (2, 2, 2))
    with torch.no_grad():
        target.head.weight.zero_()
        target.head.bias.copy_(torch.from_numpy(videomae_target(pixels_BLPC.numpy())).flatten())
    assert target(torch.randn(1, 1, 4), pixels_BLPC).item() < 1e-9


@pytest.mark.parametrize("flat", [0, 1, 3])
def test_the_baseline_of_pixels_is_the_loss_of_predicting_means(flat: int) -> None:
    """The variance is unbiased, so a tubelet of 8 pixels that vary has 7 / 8, and a constant one has 0."""
    pixels_BLPC = torch.randint(0, 256, (2, 4, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels_BLPC[:, :flat] = 16
    target = PixelTarget(6, (2, 2, 2))
    torch.nn.init.zeros_(target.head.weight)
    loss = target(torch.randn(2, 4, 6), pixels_BLPC)
    assert target.numbers(loss, pixels_BLPC) == {}, "training needs no baseline"
    (baseline,) = target.eval().numbers(loss, pixels_BLPC).values()
    assert baseline.item() == pytest.approx((4 - flat) / 4 * 7 / 8, rel=1e-3)
    assert baseline.item() == pytest.approx(loss.item(), rel=1e-6), "a head of zeros predicts means"


@pytest.mark.parametrize("value", [0, 1, 77, 255])
def test_constant_tubelets_have_a_finite_loss(value: int) -> None:
    target = PixelTarget(6, (2, 8, 8))
    h_BLD = torch.randn(2, 3, 6, requires_grad=True)
    loss = target(h_BLD, torch.full((2, 3, 128, 3), value, dtype=torch.uint8))
    (gradient,) = torch.autograd.grad(loss, h_BLD)
    assert loss.isfinite() and gradient.isfinite().all()
    assert loss.item() == pytest.approx(target.head(h_BLD).square().mean().item(), rel=0.05)  # the target is 0


def test_tubelets_of_one_pixel_are_refused() -> None:
    with pytest.raises(ValueError, match="one pixel.*code_patch"):
        PixelTarget(6, (1, 1, 1))


def test_make_target_fits_the_patching() -> None:
    assert isinstance(make_target(Patching("codes", (2, 1, 1)), DIGITS, 6, "joint"), CodeTarget)
    pixels = make_target(Patching("pixels", (2, 3, 4)), PLAIN, 6, "joint")
    assert isinstance(pixels, PixelTarget)
    assert pixels.head.out_features == 2 * 3 * 4 * 3
