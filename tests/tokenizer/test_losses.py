"""Training loss of a tokenizer: pixel errors of undamaged clips only, PSNR of known errors, usage and perplexity of known
counts of codes, and an adversarial loss from its start step on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.small_tokenizers import QUANTIZERS, build, pixels, state
from tests.tokenizer.test_lpips import random_weights, write_weights
from tokenizer import VQ3D
from tokenizer.base import to_float
from tokenizer.loss_settings import Losses
from tokenizer.losses import Reconstruction
from tokenizer.lpips import load_lpips
from tokenizer.measures import code_health, psnr

ONE_GREY_LEVEL = (1 / 127.5) ** 2


@pytest.mark.parametrize("error, decibels", [(4, 0), (0.04, 20), (4e-4, 40), (ONE_GREY_LEVEL, 48.1308), (0, 106.0206)])
def test_psnr_of_a_known_error(error: float, decibels: float) -> None:
    assert psnr(torch.tensor(float(error))).item() == pytest.approx(decibels, abs=1e-3)


@pytest.mark.parametrize(
    "counts, perplexity, usage, dead",
    [
        *(([7] * vocab, vocab, 1, 0) for vocab in (1, 2, 1000)),
        ([0, 0, 31, 0, 0], 1, 0.2, 4),
        ([2, 1, 1, 0], 2**1.5, 0.75, 1),
        ([0] * 5, 1, 0, 5),
        # Not exact in fp32.
        ([2**40, 2**40, 1], 2, 1, 0),
    ],
    ids=range(7),
)
def test_code_health_of_known_counts(counts: list[int], perplexity: float, usage: float, dead: int) -> None:
    """Perplexity is the exponential of the entropy."""
    health = code_health([torch.tensor(counts)])
    assert health["perplexity"].item() == pytest.approx(perplexity, abs=1e-6)
    assert health["code_usage"].item() == pytest.approx(usage)
    assert health["dead_codes"].item() == dead


# --- settings


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"motion": -0.1}, "loss.motion is -0.1"),
        ({"lpips": -0.1}, "loss.lpips is -0.1"),
        ({"lpips": math.nan}, "loss.lpips is nan"),
        ({"lpips": math.inf, "lpips_weights": Path("w")}, "loss.lpips is inf"),
        ({"lpips": 1.0}, "loss.lpips needs --loss.lpips_weights"),
        ({"adversarial": 0.0}, "loss.adversarial is 0.0"),
        ({"adversarial": -1.0}, "loss.adversarial is -1.0"),
        ({"adversarial": math.nan}, "loss.adversarial is nan"),
        ({"adversarial_cap": 0.0}, "loss.adversarial_cap is 0.0"),
        ({"adversarial_start": -1}, "loss.adversarial_start is -1"),
        ({"pixels": "huber"}, "loss.pixels is 'huber'"),
        ({"discriminator": "2d"}, "loss.discriminator is '2d'"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        Losses(**settings)
    assert "\n" not in str(refusal.value)


def test_missing_weights_are_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        Reconstruction(VQ3D(width=8, depth=0), Losses(lpips=1.0, lpips_weights=tmp_path / "nowhere"))


# --- the parts of the loss


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with random weights in the published files."""
    return write_weights(tmp_path_factory.mktemp("lpips"), random_weights())


def batch_of(clips: Tensor, real: list[bool] | None = None, step: int = 0) -> dict[str, Any]:
    """Return a batch as the training loop makes it, with black clips for damaged videos."""
    real_B = torch.tensor(real or [True] * len(clips))
    return {"pixels_BTHWC": clips * real_B[:, None, None, None, None], "real_B": real_B, "step": step}


def gradients(module: Reconstruction) -> list[Tensor]:
    return [p.grad.clone() for p in module.tokenizer.parameters() if p.grad is not None]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_the_loss_is_the_sum_of_pixel_error_and_quantizer_loss(quantizer: str, kind: Any) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}").train()
    clips = pixels(4)
    before = state(tokenizer)
    results = Reconstruction(tokenizer, Losses(pixels=kind))(batch_of(clips))
    assert results["loss"].requires_grad and not results["psnr"].requires_grad
    assert all(value.shape == () for value in results.values())
    results["loss"].backward()
    assert tokenizer.encoder[0].weight.grad.abs().max() > 0
    tokenizer.load_state_dict(before)
    out = tokenizer(clips)
    error = out["video"] - (clips.float() / 127.5 - 1)
    of_pixels = error.square().mean() if kind == "mse" else error.abs().mean()
    assert results["loss"].item() == pytest.approx((of_pixels + out["quantizer"]).item(), rel=1e-5)
    assert results["quantizer"].item() == out["quantizer"].item() != 0
    assert results["psnr"].item() == pytest.approx(10 * math.log10(4 / error.square().mean().item()), abs=1e-3)
    assert results["code_usage"].item() == pytest.approx(len(out["codes"].unique()) / tokenizer.vocab_size)
    assert set(results) == {"loss", "psnr", "quantizer", "code_usage", "dead_codes", "perplexity"}


@pytest.mark.parametrize("frames", [1, 4])
def test_motion_is_the_error_of_the_differences_between_frames(frames: int) -> None:
    tokenizer = build("vq3d-1x8x8-fsq240")
    clips = pixels(2, frames, 16, 16)
    plain = Reconstruction(tokenizer, Losses())(batch_of(clips))["loss"]
    results = Reconstruction(tokenizer, Losses(motion=3.0))(batch_of(clips))["loss"]
    video = tokenizer(clips)["video"]
    moved = [
        (video[:, t + 1] - video[:, t]) - (to_float(clips)[:, t + 1] - to_float(clips)[:, t]) for t in range(frames - 1)
    ]
    expected = torch.stack(moved).square().mean().item() if moved else 0.0
    assert results.item() == pytest.approx(plain.item() + 3 * expected, rel=1e-4)
    assert (expected > 0) == (frames > 1)


def test_lpips_is_added_with_its_weight(lpips_weights: Path) -> None:
    tokenizer = build("vq3d-2x8x8-fsq240")
    clips = pixels(2, 4, 32, 16)
    plain = Reconstruction(tokenizer, Losses())(batch_of(clips))
    module = Reconstruction(tokenizer, Losses(lpips=0.3, lpips_weights=lpips_weights))
    results = module(batch_of(clips))
    video = tokenizer(clips)["video"]
    distance = load_lpips(lpips_weights)
    each = [
        distance(video[clip, t].movedim(-1, 0)[None], to_float(clips)[clip, t].movedim(-1, 0)[None])
        for clip in range(2)
        for t in range(4)
    ]
    assert results["lpips"].item() == pytest.approx(torch.cat(each).mean().item(), rel=1e-4)
    assert results["lpips"] > 0
    assert results["loss"].item() == pytest.approx((plain["loss"] + 0.3 * results["lpips"]).item(), rel=1e-5)
    assert results["psnr"] == plain["psnr"]
    plain["loss"].backward()
    without = gradients(module)
    module.zero_grad()
    results["loss"].backward()
    assert not all(map(torch.equal, without, gradients(module)))
    assert module.networks == [tokenizer]
    assert not any(name.startswith("lpips") for name in module.state_dict())


@pytest.mark.parametrize("settings", [{}, {"pixels": "l1"}, {"motion": 4.0}, {"lpips": 0.5}])
def test_clips_of_damaged_videos_do_not_count(settings: dict[str, Any], lpips_weights: Path) -> None:
    tokenizer = build("vq3d-2x8x8-fsq240").train()  # its spread loss is a statistic of all clips
    module = Reconstruction(tokenizer, Losses(lpips_weights=lpips_weights if "lpips" in settings else None, **settings))
    clips = pixels(4, 4, 16, 16)
    real = [True, False, True, False]
    reference_results = module(batch_of(clips[::2]))
    partial = module(batch_of(clips, real))
    other = module(batch_of(clips))
    assert reference_results.keys() == partial.keys()
    for name, value in reference_results.items():
        assert torch.allclose(value, partial[name], rtol=1e-5), name
    assert not torch.allclose(reference_results["loss"], other["loss"], rtol=1e-3)
    reference_results["loss"].backward()
    expected = gradients(module)
    module.zero_grad()
    partial["loss"].backward()
    for gradient, reference in zip(gradients(module), expected, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-6)
    all_damaged = module(batch_of(clips, [False] * 4))
    assert all_damaged["loss"] == 0 and all(value.isfinite() for value in all_damaged.values())
    assert all_damaged["code_usage"] == 0


def test_the_adversarial_loss_starts_at_its_step_and_the_discriminator_before() -> None:
    clips = pixels(2, 4, 16, 16)
    alone = Reconstruction(build("vq3d-2x8x8-fsq240").train(), Losses())
    plain = alone(batch_of(clips))
    plain["loss"].backward()
    torch.manual_seed(0)
    module = Reconstruction(
        build("vq3d-2x8x8-fsq240").train(), Losses(discriminator="3d", adversarial_start=5, adversarial=0.7)
    )
    assert module.adversary is not None
    before = module(batch_of(clips, step=4))
    before["loss"].backward()
    assert before["generator"] == 0 and before["adversarial_weight"] == 0
    assert before["discriminator"] > 0
    assert before["loss"].item() == pytest.approx((plain["loss"] + before["discriminator"]).item(), rel=1e-5)
    assert all(map(torch.equal, gradients(module), gradients(alone)))
    learned = [p.grad.abs().max() for p in module.adversary.parameters() if p.grad is not None and p.ndim > 1]
    assert learned and min(learned) > 0
    module.zero_grad()
    after = module(batch_of(clips, step=5))
    after["loss"].backward()
    assert after["generator"] != 0 and 0 < after["adversarial_weight"] <= 1
    expected = plain["loss"] + after["generator"] + after["discriminator"]
    assert after["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert not all(map(torch.equal, gradients(module), gradients(alone)))


def test_all_trained_parameters_belong_to_the_networks(lpips_weights: Path) -> None:
    tokenizer = build("vq3d-2x8x8-emavq16")
    plain = Reconstruction(tokenizer, Losses(adversarial=0.5))
    assert plain.networks == [tokenizer] and plain.adversary is None and plain.lpips is None
    both = Reconstruction(tokenizer, Losses(lpips=1.0, lpips_weights=lpips_weights, discriminator="3d"))
    assert both.networks == [tokenizer, both.adversary]
    trained = {id(p) for network in both.networks for p in network.parameters() if p.requires_grad}
    assert trained == {id(p) for p in both.parameters() if p.requires_grad}


def test_only_the_discriminator_has_betas_of_its_own() -> None:
    tokenizer = build("vq3d-2x8x8-emavq16")
    assert Reconstruction(tokenizer, Losses(discriminator="3d")).own_betas == {}
    module = Reconstruction(tokenizer, Losses(discriminator="3d", discriminator_betas=(0.5, 0.9)))
    assert module.own_betas == {module.adversary: (0.5, 0.9)}
    with pytest.raises(ValueError, match="discriminator_betas has no effect without"):
        Losses(discriminator_betas=(0.5, 0.9))
    with pytest.raises(ValueError, match="discriminator_betas"):
        Losses(discriminator="3d", discriminator_betas=(0.5, 1.0))


def test_losses_are_fp32_under_autocast(lpips_weights: Path) -> None:
    """The losses only approximate those without autocast, because vectors between two codes may get the other code."""
    losses = Losses(lpips=0.5, lpips_weights=lpips_weights, discriminator="3d", adversarial_start=0)
    torch.manual_seed(0)
    module = Reconstruction(build("vq3d-2x8x8-fsq240", stem="haar").train(), losses)
    batch = batch_of(pixels(2, 4, 16, 16))
    exact = module(batch)
    with torch.autocast("cpu", torch.bfloat16):
        results = module(batch)
    assert {value.dtype for value in results.values()} == {torch.float32, torch.float64}
    for name in ("psnr", "quantizer", "lpips", "discriminator"):
        assert results[name].item() == pytest.approx(exact[name].item(), rel=0.1), name
    results["loss"].backward()
    assert all(gradient.isfinite().all() for gradient in gradients(module))


def test_pixels_in_another_range_are_refused() -> None:
    module = Reconstruction(VQ3D(width=8, depth=1), Losses())
    with pytest.raises(ValueError, match="float32"):
        module({"pixels_BTHWC": torch.rand(1, 2, 8, 8, 3), "real_B": torch.ones(1, dtype=torch.bool), "step": 0})
