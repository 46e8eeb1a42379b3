"""Learned codebooks: codes are nearest neighbours, the codebook follows its inputs, and dead codes are revived. FSQ, which
has no codebook, recovers from saturation by its spread loss."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tokenizer.test_quantizers import KINDS, make, vectors
from tokenizer.quantizers import make_quantizer


@pytest.mark.parametrize("name, options", [k for k in KINDS if k[0][:3] in ("ema", "sim")])
def test_codes_are_nearest_neighbours_in_the_codebook(name: str, options: dict[str, Any]) -> None:
    quantizer = make(name, **options)
    book = quantizer.codebook()
    assert book is not None and book.shape == (32, quantizer.channels) and quantizer.levels is None
    z = vectors(quantizer, count=500, seed=5)
    quantized, codes, _ = quantizer(z)
    z, book = z.double(), book.detach().double()
    away = -F.normalize(z, dim=-1) @ book.T if options.get("cosine") else torch.cdist(z, book.expand(4, -1, -1))
    assert (away.gather(-1, codes[..., None])[..., 0] - away.amin(-1)).max() < 1e-6
    assert torch.equal(quantized.double(), book[codes])
    if options.get("cosine"):
        assert torch.allclose(book.norm(dim=-1), torch.ones(32).double(), atol=1e-5)


def test_simvq_quantizes_zero_vectors_to_its_codebook() -> None:
    """The rotation trick in training gives the direction of the code only if the input is not zero."""
    quantizer = make("simvq32")
    quantized, codes, _ = quantizer(torch.zeros(1, 3, 16))
    assert torch.equal(quantized, quantizer.vectors(codes)) and quantized.abs().max() > 0.01


@pytest.mark.parametrize("name", ["emavq32", "simvq32"])
def test_gradients_are_straight_through_or_follow_the_rotation_trick(name: str) -> None:
    for rotation_trick in (False, True):
        quantizer = make(name, rotation_trick=rotation_trick).train()
        z = vectors(quantizer, seed=6).requires_grad_()
        quantized, codes, _ = quantizer(z)
        along = F.normalize(quantized.detach(), dim=-1)
        (gradient,) = torch.autograd.grad((quantized * along).sum(), z)
        ratio = quantized.detach().norm(dim=-1, keepdim=True) / z.detach().norm(dim=-1, keepdim=True)
        expected = ratio * F.normalize(z.detach(), dim=-1) if rotation_trick else along
        assert torch.allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, options, weight",
    [
        ("emavq32", {}, 0.25),
        ("emavq32", {"commitment": 3.0}, 3.0),
        ("simvq32", {}, 1.25),
        ("simvq32", {"commitment": 2.0, "input_commitment": 0.5}, 3.0),
    ],
)
def test_the_loss_is_the_weighted_distance_to_the_codes(name: str, options: dict[str, Any], weight: float) -> None:
    quantizer = make(name, **options)
    z = vectors(quantizer, seed=6)
    away = (z - quantizer(z)[0]).square().mean().item()
    assert quantizer.train()(z)[2].item() == pytest.approx(weight * away, rel=1e-4)


def test_simvq_moves_all_codes_at_once_and_keeps_its_frozen_codebook() -> None:
    quantizer = make("simvq32").train()
    frozen = {k: v.clone() for k, v in quantizer.state_dict().items() if "frozen" in k}
    before = quantizer.codebook().detach().clone()  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    # Three vectors use three codes at most.
    quantizer(vectors(quantizer, 1, 3))[2].backward()
    optimizer.step()
    moved = (quantizer.codebook() - before).abs().amax(-1)  # type: ignore[operator]
    assert (moved > 0).all()
    assert frozen and all(torch.equal(quantizer.state_dict()[k], v) for k, v in frozen.items())


def spots(count: int = 8, shift: float = 0.0, noise: float = 0.02, seed: int = 0) -> Tensor:
    """Return vectors around `count` points on a circle of radius 1, (1, 40 * count, 2)."""
    angle = torch.arange(count) / count * 2 * math.pi
    places = torch.stack([angle.cos(), angle.sin()], -1).repeat(40, 1)
    return (places + shift + noise * torch.randn(places.shape, generator=torch.Generator().manual_seed(seed)))[None]


def test_the_codebook_follows_its_inputs_by_the_decay() -> None:
    """Eight codes start on eight vectors. The vectors then move, and each step moves a code by a tenth of the distance."""
    quantizer = make_quantizer("emavq8", {"channels": 2, "decay": 0.9, "revive_below": 0}).train()
    start = spots(noise=0)[:, :8]
    quantizer(start)
    before = quantizer.codebook().clone()  # type: ignore[union-attr]
    assert torch.allclose(torch.cdist(before, start[0]).amin(1), torch.zeros(8), atol=1e-4)
    for step in range(1, 30):
        quantizer(start + 0.1)
        assert torch.allclose(quantizer.codebook(), before + 0.1 * (1 - 0.9**step), atol=1e-4)


def after_a_move(steps: int, revive_below: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Train a codebook, then yield codes and vectors of each step after the vectors have moved far away."""
    torch.manual_seed(0)
    quantizer = make_quantizer("emavq8", {"channels": 2, "decay": 0.5, "revive_below": revive_below}).train()
    for seed in range(5):
        quantizer(spots(seed=seed))
    for seed in range(steps):
        quantizer(spots(shift=100, seed=seed))
        yield quantizer.codebook().clone(), spots(shift=100, seed=seed)[0]  # type: ignore[union-attr]


def test_dead_codes_are_revived() -> None:
    *_, (codes, inputs) = after_a_move(20, revive_below=2)
    assert (codes - 100).norm(dim=-1).max() < 1.2
    assert len(torch.cdist(inputs, codes).argmin(1).unique()) > 4
    *_, (codes, inputs) = after_a_move(20, revive_below=0)
    assert (codes - 100).norm(dim=-1).max() > 50
    assert len(torch.cdist(inputs, codes).argmin(1).unique()) == 1


def test_a_revived_code_is_a_vector_of_the_step_and_stays_near_the_inputs() -> None:
    """If its moving sums were kept, the next step would move the code back to where it died."""
    revived: set[int] = set()
    count = 0
    for codes, inputs in after_a_move(30, revive_below=2):
        for code in revived:
            assert (codes[code] - 100).norm() < 1.2
        revived = {code for code in range(8) if (codes[code] == inputs).all(-1).any()}
        count += len(revived)
    assert count > 4


@pytest.mark.parametrize("count", [1, 3, 31, 32, 200])
@pytest.mark.parametrize("cosine", [False, True])
def test_a_codebook_is_initialised_by_any_number_of_vectors_and_is_in_use_later(count: int, cosine: bool) -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer("emavq32", {"cosine": cosine}).train()
    _, codes, loss = quantizer(vectors(quantizer, 1, count))
    assert codes.min() >= 0 and codes.max() < 32 and loss.isfinite()
    assert quantizer.codebook().isfinite().all()  # type: ignore[union-attr]
    for seed in range(30):
        quantizer(vectors(quantizer, 4, 100, seed))
    _, codes, _ = quantizer.eval()(vectors(quantizer, 4, 100, 99))
    assert len(codes.unique()) > 24


def test_a_loaded_codebook_continues_training_identically() -> None:
    quantizer = make("emavq32")
    loaded = make_quantizer("emavq32", {})
    loaded.load_state_dict(quantizer.state_dict())
    for seed in (20, 21):
        for each in (quantizer, loaded):
            torch.manual_seed(seed)
            each.train()(vectors(quantizer, seed=seed))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in quantizer.state_dict().items())


# --- collapse of FSQ


def used_after_training(spread: float) -> tuple[int, int]:
    """Return the numbers of codes in use before and after 300 steps of an autoencoder that starts saturated."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 3), nn.Linear(3, 6)
    quantizer = make_quantizer("fsq240", {"spread": spread}).train()
    nn.init.constant_(encoder.bias, 20)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.2)
    data = torch.randn(1, 500, 3) @ torch.randn(3, 6)
    used = []
    for _ in range(300):
        quantized, codes, loss = quantizer(encoder(data))
        used.append(len(codes.unique()))
        optimizer.zero_grad()
        ((decoder(quantized) - data).square().mean() + loss).backward()
        optimizer.step()
    return used[0], used[-1]


def test_a_saturated_fsq_recovers_only_with_the_spread_loss() -> None:
    assert used_after_training(spread=0.0) == (1, 1)
    first, last = used_after_training(spread=0.01)
    assert first == 1 and last > 40


def test_the_spread_loss_is_near_zero_for_normal_vectors_and_zero_in_evaluation_mode() -> None:
    quantizer = make("fsq240", spread=1.0)
    z = vectors(quantizer, 1, 20000)
    assert quantizer(z * 20)[2] == 0
    quantizer.train()
    assert quantizer(z)[2] < 1e-3
    for worse in (z * 20, z + 3, z[..., :1].expand_as(z), z * 0.01):
        assert quantizer(worse)[2] > 0.1
    assert make("fsq240", spread=0).train()(z * 20)[2] == 0
