"""One backward pass gives the tokenizer and its adversary the gradients that they would get from separate optimizers."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.forked import START_METHOD
from tokenizer.adversarial import Adversary, DiscriminatorName, hinge_loss, make_discriminator

KINDS: list[DiscriminatorName] = ["patch", "3d"]


class Tiny(nn.Module):
    """A generator, its reconstruction loss and an adversary, combined as in `Reconstruction`."""

    def __init__(self, kind: DiscriminatorName, *, start: int = 0, weight: float = 0.5, cap: float = 1e4) -> None:
        super().__init__()
        if kind == "patch":
            pytest.importorskip("taming")
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Conv3d(3, 4, 1), nn.SiLU(), nn.Conv3d(4, 3, 1))
        self.adversary = Adversary(kind, start=start, weight=weight, cap=cap)

    def forward(self, real_BCTHW: Tensor, step: int = 0) -> dict[str, Tensor]:
        fake_BCTHW = self.generator(real_BCTHW)
        reconstruction = (fake_BCTHW.float() - real_BCTHW).square().mean()
        losses = self.adversary(real_BCTHW, fake_BCTHW, reconstruction, self.generator[-1].weight, step)
        total = reconstruction + losses["generator"] + losses["discriminator"]
        return {"reconstruction": reconstruction, "loss": total, **losses}


def videos(count: int = 2, frames: int = 3, size: int = 24, seed: int = 0) -> Tensor:
    """Return smooth random videos in [-1, 1], (B, 3, T, H, W)."""
    coarse = torch.randn(count, 3, frames, 6, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (frames, size, size), mode="trilinear").tanh()


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """Return the gradients of a loss with respect to all parameters, with zeros for unused ones."""
    parameters = list(module.parameters())
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))


def of_backward(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> bool:
    return len(a) == len(b) and all((x - y).norm() <= tolerance * y.norm() + 1e-9 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames, size", [(1, 24), (3, 40), (16, 64)])
def test_discriminators_return_a_grid_of_logits_for_clips_of_any_length(
    kind: DiscriminatorName, frames: int, size: int
) -> None:
    if kind == "patch":
        pytest.importorskip("taming")
    logits = make_discriminator(kind)(videos(2, frames, size))
    times = frames if kind == "patch" else math.ceil(math.ceil(frames / 2) / 2)
    assert logits.shape == (2, times, *(2 * [size // 8 - 2 if kind == "patch" else size // 8]))


@pytest.mark.parametrize("kind, least", [("patch", 24), ("3d", 8)])
def test_frames_that_are_too_small_are_refused_in_one_line(kind: DiscriminatorName, least: int) -> None:
    if kind == "patch":
        pytest.importorskip("taming")
    discriminator = make_discriminator(kind)
    discriminator(videos(2, 1, least))
    with pytest.raises(ValueError, match=f"{least - 1}x{least - 1} are too small"):
        discriminator(videos(2, 1, least - 1))


def test_the_patch_discriminator_has_the_layers_and_initialisation_of_taming() -> None:
    """Weights have a standard deviation of 0.02. Frames are processed separately, in order."""
    pytest.importorskip("taming")
    torch.manual_seed(0)
    discriminator = make_discriminator("patch").eval()
    weights = [p for p in discriminator.parameters() if p.ndim == 4]
    assert [len(w) for w in weights] == [64, 128, 256, 512, 1]
    assert all(w.std().item() == pytest.approx(0.02, rel=0.05) for w in weights)
    clip = videos(2, 3)
    assert torch.allclose(discriminator(clip)[1, 2], discriminator(clip[1:, :, 2:])[0, 0], atol=1e-6)


def test_the_3d_discriminator_has_spectral_norm_one() -> None:
    """The norm is one in every convolution, even after its weights have grown."""
    discriminator = make_discriminator("3d")
    with torch.no_grad():
        for p in discriminator.parameters():
            p.mul_(7)
    discriminator(videos(1, 1, 8))
    matrices = [m.weight.detach().flatten(1) for m in discriminator.eval().modules() if isinstance(m, nn.Conv3d)]
    norms = [torch.linalg.eigvalsh(w @ w.T)[-1].sqrt().item() for w in matrices]
    assert norms == pytest.approx([1, 1, 1, 1], rel=0.05)


def test_invalid_settings_of_an_adversary_are_refused() -> None:
    for wrong in ({"start": -1}, {"weight": 0.0}, {"cap": -1.0}, {"cap": math.nan}):
        settings: dict[str, Any] = {"start": 0, "weight": 0.5, "cap": 1.0, **wrong}
        with pytest.raises(ValueError, match=f"adversarial.*{next(iter(wrong.values()))}"):
            Adversary("3d", **settings)
    with pytest.raises(ValueError, match="patch or 3d, got '4d'"):
        Adversary("4d", start=0, weight=0.5, cap=1.0)  # type: ignore[arg-type]


def test_without_taming_the_error_of_the_patch_discriminator_has_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "taming.modules.discriminator.model", None)
    with pytest.raises(ValueError, match="pip install --no-deps taming-transformers-rom1504"):
        make_discriminator("patch")


def test_hinge_loss_of_known_logits() -> None:
    """The real logits 2, 1, 0 and -1 have the losses 0, 0, 1 and 2. For fake logits the signs are reversed."""
    real, fake = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([-2.0, -1.0, 0.0, 0.5])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (3 / 4 + 2.5 / 4))
    assert hinge_loss(0 * real, 0 * fake).item() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_discriminator_is_that_of_its_own_loss(kind: DiscriminatorName) -> None:
    """The generator loss does not change the discriminator's running statistics and spectral norms."""
    ours, alone = Tiny(kind), Tiny(kind)
    real = videos()
    ours(real)["loss"].backward()
    discriminator = alone.adversary.discriminator
    loss = hinge_loss(discriminator(real), discriminator(alone.generator(real).detach()))
    loss.backward()
    assert same(of_backward(ours.adversary), of_backward(alone.adversary))
    assert len(of_backward(ours.adversary)) == len(list(ours.adversary.parameters()))
    assert same(list(ours.adversary.buffers()), list(alone.adversary.buffers()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_generator_is_that_with_a_frozen_discriminator(kind: DiscriminatorName) -> None:
    ours, alone = Tiny(kind), Tiny(kind)
    real = videos()
    losses = ours(real)
    losses["loss"].backward()
    alone.adversary.requires_grad_(False)
    fake = alone.generator(real)
    reconstruction, adversarial = (fake - real).square().mean(), -alone.adversary.discriminator(fake).mean()
    norms = [gradients(x, alone.generator[-1])[0].norm() for x in (reconstruction, adversarial)]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    assert losses["adversarial_weight"].item() == pytest.approx(weight.item(), rel=1e-5)
    assert not losses["adversarial_weight"].requires_grad
    assert losses["generator"].item() == pytest.approx((weight * adversarial).item(), rel=1e-5)
    expected = gradients(reconstruction + weight * adversarial, alone.generator)
    assert close(of_backward(ours.generator), expected)
    # Control: the adversarial loss changes the gradient.
    assert not close(gradients(reconstruction, alone.generator), expected, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_start_only_the_discriminator_learns(kind: DiscriminatorName) -> None:
    """The gradients of the generator are exactly those of the reconstruction loss."""
    ours, alone = Tiny(kind, start=5), Tiny(kind)
    real = videos()
    losses = ours(real, step=4)
    losses["loss"].backward()
    (alone.generator(real) - real).square().mean().backward()
    assert same(of_backward(ours.generator), of_backward(alone.generator))
    assert losses["generator"].item() == 0 and losses["adversarial_weight"].item() == 0
    assert all(gradient.abs().max() > 0 for gradient in of_backward(ours.adversary) if gradient.ndim > 1)
    assert ours(real, step=5)["generator"].item() != 0


def test_the_adaptive_weight_is_capped() -> None:
    real = videos()
    free = Tiny("3d")(real)["adversarial_weight"].item()
    for cap, expected in ((free / 3, free / 3), (free * 3, free)):
        assert Tiny("3d", cap=cap)(real)["adversarial_weight"].item() == pytest.approx(expected)


def test_a_discriminator_without_gradients_gives_a_finite_weight() -> None:
    """Without gradients the denominator is 1e-4, and the cap limits the weight."""
    ours = Tiny("3d", cap=100.0)
    with torch.no_grad():
        ours.adversary.discriminator.layers[0].bias.fill_(-1e4)  # type: ignore[union-attr, operator]
        ours.adversary.discriminator.layers[1].negative_slope = 0.0  # type: ignore[union-attr, operator]
    losses = ours(videos())
    assert 1 < losses["adversarial_weight"].item() <= 100
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_gradients_are_close_to_those_of_fp32(kind: DiscriminatorName) -> None:
    ours, exact = Tiny(kind), Tiny(kind)
    with torch.autocast("cpu", torch.bfloat16):
        losses = ours(videos())
    losses["loss"].backward()
    expected = exact(videos())
    expected["loss"].backward()
    assert {value.dtype for value in losses.values()} == {torch.float32}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.02), name
    both = [torch.cat([gradient.flatten() for gradient in of_backward(x.generator)]) for x in (ours, exact)]
    assert nn.functional.cosine_similarity(*both, dim=0) > 0.99


def _in_one_of_two(rank: int, folder: str) -> None:
    """Run one rank on its half of the batch, before and after the start, with both discriminators."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for kind in KINDS:
        ours = Tiny(kind, start=1)
        parallel = DistributedDataParallel(ours)
        for step in (0, 1):
            parallel.zero_grad()
            out = parallel(videos(4).chunk(2)[rank], step)
            out["loss"].backward()
            results[f"{kind} {step}"] = (out["adversarial_weight"], of_backward(ours))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_equal_gradients_and_for_3d_those_of_a_single_process(tmp_path: Path) -> None:
    """The patch discriminator has batch norm with statistics per process, so it differs from a single process."""
    pytest.importorskip("taming")
    torch.multiprocessing.start_processes(_in_one_of_two, (str(tmp_path),), 2, start_method=START_METHOD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == 4
    for name, (weight, gradient) in first.items():
        assert torch.equal(weight, second[name][0]), name
        assert same(gradient, second[name][1]), name
    alone = Tiny("3d", start=1)
    for step in (0, 1):
        alone.zero_grad()
        out = alone(videos(4), step)
        out["loss"].backward()
        weight, gradient = first[f"3d {step}"]
        assert weight.item() == pytest.approx(out["adversarial_weight"].item(), rel=1e-4)
        assert close(gradient, of_backward(alone), 1e-3)
