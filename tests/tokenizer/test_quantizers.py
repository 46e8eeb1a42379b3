"""Codes are in the vocabulary and give the quantized vectors. Each quantizer equals its definition. Options are checked."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.quantizers import QUANTIZERS, Quantizer, make_quantizer

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("fsq240", {}),
    ("fsq15", {"levels": [5, 3]}),
    ("fsq1000", {"preserve_symmetry": True}),
    ("fsq240", {"preserve_symmetry": True, "noise_dropout": 0.5}),
    ("emavq32", {}),
    ("emavq32", {"cosine": True, "rotation_trick": False}),
    ("lfq64", {}),
    ("lfq64", {"spherical": True}),
    ("simvq32", {}),
    ("simvq32", {"rotation_trick": False, "channels": 3}),
]
IDS = ["-".join([name, *options]) for name, options in KINDS]
every_kind = pytest.mark.parametrize("name, options", KINDS, ids=IDS)


def vectors(quantizer: Quantizer, clips: int = 4, count: int = 100, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, count, quantizer.channels, generator=generator) * scale


def make(name: str, **options: Any) -> Quantizer:
    """Make a quantizer in evaluation mode. The codebook of EMA VQ is trained on two batches first."""
    torch.manual_seed(0)
    quantizer = make_quantizer(name, options)
    if name.startswith("emavq"):
        for seed in (10, 11):
            quantizer.train()(vectors(quantizer, seed=seed))
    return quantizer.eval()


@every_kind
def test_codes_are_in_the_vocabulary_and_give_the_quantized_vectors(name: str, options: dict[str, Any]) -> None:
    quantizer = make(name, **options)
    for scale in (0.1, 1.0, 100.0):
        z = vectors(quantizer, scale=scale)
        quantized, codes, loss = quantizer(z)
        assert codes.shape == (4, 100) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < quantizer.vocab_size
        assert quantized.shape == z.shape and quantized.dtype == torch.float32
        assert torch.allclose(quantizer.vectors(codes), quantized, rtol=0, atol=1e-6)
        assert loss.shape == () and loss.isfinite()
        for shape in ((400,), (2, 2, 25, 4)):
            assert torch.equal(quantizer.vectors(codes.view(shape)), quantizer.vectors(codes).view(*shape, -1))


@every_kind
def test_every_code_has_a_vector_of_its_own(name: str, options: dict[str, Any]) -> None:
    quantizer = make(name, **options)
    table = quantizer.vectors(torch.arange(quantizer.vocab_size))
    assert table.shape == (quantizer.vocab_size, quantizer.channels) and table.dtype == torch.float32
    assert len(table.unique(dim=0)) == quantizer.vocab_size


@every_kind
@pytest.mark.usefixtures("two_threads")
def test_quantizing_does_not_depend_on_other_vectors(name: str, options: dict[str, Any]) -> None:
    quantizer = make(name, **options)
    z = vectors(quantizer, count=37)
    _, codes, _ = quantizer(z)
    alone = torch.stack([torch.cat([quantizer(v[None, None])[1][0] for v in row]) for row in z])
    assert torch.equal(alone, codes)
    assert torch.equal(quantizer(z.flatten(0, 1)[None])[1], codes.flatten()[None])


@every_kind
def test_codes_in_training_mode_are_those_of_evaluation_mode(name: str, options: dict[str, Any]) -> None:
    quantizer = make(name, **options)
    z = vectors(quantizer)
    _, codes, _ = quantizer(z)
    assert torch.equal(quantizer.train()(z)[1], codes)


@every_kind
def test_gradients_reach_the_encoder_in_training(name: str, options: dict[str, Any]) -> None:
    quantizer = make(name, **options).train()
    encoder = nn.Linear(5, quantizer.channels)
    x, target = torch.randn(2, 50, 5), torch.randn(2, 50, quantizer.channels)
    quantized, _, loss = quantizer(encoder(x))
    (quantized - target).square().mean().backward(retain_graph=True)
    of_pixels = encoder.weight.grad.clone()  # type: ignore[union-attr]
    assert of_pixels.isfinite().all() and (of_pixels.abs().amax(1) > 0).all()
    loss.backward()
    assert (encoder.weight.grad - of_pixels).abs().max() > 0  # type: ignore[operator]


@every_kind
def test_quantizing_under_autocast_is_exact(name: str, options: dict[str, Any]) -> None:
    quantizer = make(name, **options)
    z = vectors(quantizer)
    quantized, codes, _ = quantizer(z)
    codebook = quantizer.codebook()
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z)
        again, vectors_again = quantizer.codebook(), quantizer.vectors(codes)
        lossy = quantizer(z.bfloat16())
    assert torch.equal(lossy[1], quantizer(z.bfloat16().float())[1])
    with torch.autocast("cpu", torch.bfloat16):
        trained = quantizer.train()(z)
    assert torch.equal(inside[1], codes) and torch.equal(inside[0], quantized) and inside[0].dtype == torch.float32
    assert torch.equal(trained[1], codes)
    assert trained[0].dtype == trained[2].dtype == lossy[0].dtype == torch.float32
    assert torch.allclose(vectors_again, quantized, rtol=0, atol=1e-6)
    assert (again is None and codebook is None) or torch.equal(again, codebook)


# --- codes made of digits


@pytest.mark.parametrize("name, options", [k for k in KINDS if k[0][:3] in ("fsq", "lfq")])
def test_digits_of_codes_lowest_first_are_the_channels_of_vectors(name: str, options: dict[str, Any]) -> None:
    """Digit i of FSQ is channel i, but the lowest digit of LFQ is its last channel."""
    quantizer = make(name, **options)
    assert quantizer.levels is not None
    (levels,) = quantizer.levels
    assert math.prod(levels) == quantizer.vocab_size and len(levels) == quantizer.channels
    assert quantizer.codebook() is None
    table = quantizer.vectors(torch.arange(quantizer.vocab_size))
    digits = torch.stack(torch.meshgrid(*(torch.arange(n) for n in reversed(levels)), indexing="ij"), -1)
    # Digits of all codes in ascending order, lowest digit first.
    digits = digits.flatten(0, -2).flip(-1)
    for digit, level in enumerate(levels):
        channel = digit if name.startswith("fsq") else quantizer.channels - 1 - digit
        values = [table[digits[:, digit] == value, channel].unique() for value in range(level)]
        assert [len(value) for value in values] == [1] * level
        values_L = torch.cat(values)
        assert (values_L.diff() > 0).all()
        assert torch.allclose(values_L.diff(), values_L.diff()[0].expand(level - 1), atol=1e-6)


@pytest.mark.parametrize("name, options", [k for k in KINDS if k[0].startswith("fsq")])
def test_every_code_of_fsq_is_reached_and_channels_are_rounded_independently(
    name: str, options: dict[str, Any]
) -> None:
    quantizer = make(name, **options)
    assert quantizer.levels is not None
    (levels,) = quantizer.levels
    line = torch.linspace(-6, 6, 2001)
    for channel, level in enumerate(levels):
        z = torch.zeros(2001, quantizer.channels)
        z[:, channel] = line
        digit = quantizer(z[None])[1][0] // math.prod(levels[:channel]) % level
        assert (digit.diff() >= 0).all() and digit.unique().tolist() == list(range(level))
        others = quantizer(z[None])[0][0][:, [c for c in range(quantizer.channels) if c != channel]]
        assert (others == others[0]).all()


@pytest.mark.parametrize("level", [3, 4, 255, 1000])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_of_fsq_with_many_levels_are_in_the_vocabulary(level: int, symmetric: bool) -> None:
    quantizer = make(f"fsq{3 * level}", levels=[3, level], preserve_symmetry=symmetric)
    z = torch.cat([torch.linspace(-8, 8, 40001), torch.tensor([-1e4, 1e4])])[:, None].expand(-1, 2)
    _, codes, _ = quantizer(z[None])
    assert (codes.min(), codes.max()) == (0, 3 * level - 1)
    assert len((codes // 3).unique()) == level


def test_preserve_symmetry_makes_levels_symmetric_around_zero() -> None:
    table = make("fsq240", preserve_symmetry=True).vectors(torch.arange(240))
    assert torch.allclose(table, -table.flip(0), atol=1e-6)
    assert table.abs().max() == 1
    even = make("fsq240").vectors(torch.arange(240))
    assert not torch.allclose(even, -even.flip(0), atol=0.1)


def test_noise_in_training_does_not_change_codes_and_is_at_most_half_a_unit() -> None:
    quantizer = make("fsq240", preserve_symmetry=True, noise_dropout=0.5)
    z = vectors(quantizer)
    torch.manual_seed(0)
    noisy, codes, _ = quantizer.train()(z)
    away = (noisy - quantizer.vectors(codes)).abs()
    assert 0.4 < (away > 1e-5).float().mean() < 0.6 and away.max() <= 0.5 + 1e-6 and noisy.abs().max() <= 1


def test_lfq_takes_the_sign_of_each_channel_and_spherical_vectors_have_length_one() -> None:
    plain, sphere = make("lfq64"), make("lfq64", spherical=True)
    z = vectors(plain)
    assert torch.equal(plain(z)[0], torch.where(z > 0, 1.0, -1.0))
    assert torch.allclose(sphere(z)[0], torch.where(z > 0, 1.0, -1.0) / 6**0.5)
    assert torch.equal(sphere(z)[1], plain(z)[1])
    assert torch.equal(plain(torch.zeros(1, 1, 6))[1], torch.zeros(1, 1).long())


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("inverse_temperature", [1.0, 30.0])
def test_the_loss_of_lfq_equals_its_definition(spherical: bool, inverse_temperature: float) -> None:
    """arXiv 2310.05737, eq. 5: mean entropy of p(code | vector), minus the entropy of its mean, plus the commitment loss."""
    options = {"entropy": 0.3, "diversity": 1.7, "commitment": 0.4, "inverse_temperature": inverse_temperature}
    quantizer = make("lfq16", spherical=spherical, **options).train()
    z = vectors(quantizer, seed=3).double()
    single = z.float().requires_grad_()
    _, _, loss = quantizer(single)
    loss.backward()
    double = z.requires_grad_()
    x = F.normalize(double, dim=-1) if spherical else double
    codes_VC = torch.tensor([[1.0 if code >> (3 - c) & 1 else -1.0 for c in range(4)] for code in range(16)]).double()
    codes_VC = codes_VC / 2 if spherical else codes_VC
    distances = (x.flatten(0, 1)[:, None] - codes_VC).square().sum(-1)
    chance = (-distances * inverse_temperature).softmax(-1)

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-300).log()).sum(-1)

    nearest = codes_VC[distances.argmin(-1)].view_as(x)
    expected = 0.3 * (entropy(chance).mean() - 1.7 * entropy(chance.mean(0))) + 0.4 * (x - nearest).square().mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(single.grad.double(), double.grad, rtol=1e-3, atol=1e-6)  # type: ignore[union-attr]


# --- names and options


@pytest.mark.parametrize(
    "name",
    [
        *("", "fsq", "1000", "vq16", "FSQ1000", "fsq-1000", "fsq01000", "emavq99999999", "emavq1048577", "lfq1.5"),
        *("fsq1", "emavq1", "lfq1", "simvq1"),
    ],
)
def test_the_error_for_an_unknown_quantizer_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(name))}.*fsqN, emavqN, lfqN, simvqN"):
        make_quantizer(name, {})


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("fsq1000", {"decay": 0.9}, "no option 'decay'; it has levels, spread, preserve_symmetry, noise_dropout"),
        ("emavq16", {"levels": [4, 4]}, "emavq has no option 'levels'; it has channels, decay, commitment"),
        ("lfq16", {"channels": 4}, "lfq has no option 'channels'; it has entropy"),
        ("simvq16", {"vocab_size": 4}, "simvq has no option 'vocab_size'"),
        ("fsq1000", {"spread": "0.1"}, "fsq's spread is '0.1'"),
        ("fsq1000", {"spread": True}, "fsq's spread is True"),
        ("fsq1000", {"spread": None}, "fsq's spread is None"),
        ("fsq1000", {"spread": -0.1}, "fsq's spread is -0.1"),
        ("fsq1000", {"spread": math.nan}, "fsq's spread is nan"),
        ("fsq1000", {"spread": math.inf}, "fsq's spread is inf"),
        ("fsq1000", {"preserve_symmetry": 1}, "fsq's preserve_symmetry is 1"),
        ("fsq1000", {"noise_dropout": 0.5}, "noise_dropout needs preserve_symmetry"),
        ("fsq1000", {"noise_dropout": 1.5, "preserve_symmetry": True}, "noise_dropout 1.5"),
        ("fsq1000", {"levels": "8555"}, "fsq's levels is '8555'.*\\[8, 5, 5, 5\\]"),
        ("fsq1000", {"levels": 1000}, "fsq's levels is 1000"),
        ("fsq1000", {"levels": [8, 5, 5, 5.0]}, "fsq's levels is"),
        ("fsq1000", {"levels": [10, 10]}, r"levels \(10, 10\) must be from 3 to 1000 each and multiply to 1000"),
        ("fsq1000", {"levels": [2, 500]}, "must be from 3"),
        ("fsq1000", {"levels": [1000, 1]}, "must be from 3"),
        ("fsq15", {"levels": [-5, -3]}, "must be from 3"),
        ("fsq2000", {"levels": [2000]}, "must be from 3 to 1000"),
        ("fsq1000", {"levels": []}, "must be from 3"),
        ("fsq777", {"levels": []}, "must be from 3"),
        ("fsq777", {}, "fsq777.*240, 1000, 4375, 15360, 64000.*`levels`"),
        ("emavq16", {"decay": 1.0}, "decay 1.0 must be from 0 to less than 1"),
        ("emavq16", {"decay": 1.5}, "decay 1.5"),
        ("emavq16", {"decay": -0.1}, "decay is -0.1"),
        ("emavq16", {"channels": 8.0}, "channels is 8.0"),
        ("emavq16", {"channels": True}, "channels is True"),
        ("emavq16", {"channels": 0}, "channels is 0"),
        ("emavq16", {"cosine": "yes"}, "cosine is 'yes'"),
        ("emavq16", {"revive_below": -1}, "revive_below is -1"),
        ("lfq1000", {}, "must be a power of 2"),
        ("lfq16", {"inverse_temperature": 0}, "inverse_temperature 0 must be above 0"),
        ("lfq16", {"entropy": "0"}, "entropy is '0'"),
        ("simvq16", {"channels": -3}, "channels is -3"),
    ],
)
def test_invalid_options_are_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        make_quantizer(name, options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_options_in_the_advice_against_collapse_exist(kind: str) -> None:
    options = re.findall(r"--model.options '\{(\w+): ([\d.]+)\}'", QUANTIZERS[kind].advice)
    assert bool(options) == (kind != "emavq")
    for option, value in options:
        make_quantizer({"fsq": "fsq1000"}.get(kind, f"{kind}16"), {option: float(value)})


@pytest.mark.parametrize("vocab_size", [240, 1000, 4375, 15360, 64000])
def test_fsq_has_levels_for_the_vocabularies_of_its_paper(vocab_size: int) -> None:
    (levels,) = make_quantizer(f"fsq{vocab_size}", {}).levels or ()
    assert math.prod(levels) == vocab_size and min(levels) >= 5
