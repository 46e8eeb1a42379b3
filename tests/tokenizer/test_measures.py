"""Every measure equals a value computed by hand or by a second implementation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from tokenizer.measures import (
    VideoDetector,
    bits_per_pixel,
    flicker_of,
    frechet_distance,
    load_detector,
    psnr_of,
    ssim_of,
)


def clips(count: int = 2, frames: int = 3, height: int = 20, width: int = 16, seed: int = 0) -> Tensor:
    """Return grey gradients with noise, uint8 (B, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 60, (count, frames, height, width, 3), generator=generator)
    return (noise + torch.linspace(0, 190, width)[:, None]).to(torch.uint8)


def test_psnr_of_clips_with_known_errors() -> None:
    """The clips have an error of 1 grey level everywhere, of 10 grey levels in half of the frames, and no error."""
    pixels = torch.full((3, 4, 8, 8, 3), 100, dtype=torch.uint8)
    video = pixels.clone()
    video[0] += 1
    video[1, :2] -= 10
    expected = [20 * math.log10(255), 10 * math.log10(255**2 / 50), 10 * math.log10(4e10)]
    assert psnr_of(pixels, video).tolist() == pytest.approx(expected, abs=1e-3)


def ssim_by_hand(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Return SSIM (Wang et al. 2004), computed window by window in double precision."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarities = []
    for top in range(a_HW.shape[0] - 10):
        for left in range(a_HW.shape[1] - 10):
            a, b = (x[top : top + 11, left : left + 11].astype(float) for x in (a_HW, b_HW))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            similar = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            similarities.append(similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(similarities))


def test_ssim_equals_its_definition() -> None:
    pixels, video = clips(seed=0), clips(seed=1)
    video[1] = pixels[1] // 2 + 30
    expected = [
        np.mean([ssim_by_hand(p[t, :, :, c], v[t, :, :, c]) for t in range(3) for c in range(3)])
        for p, v in zip(pixels.numpy(), video.numpy(), strict=True)
    ]
    actual = ssim_of(pixels, video)
    assert actual.tolist() == pytest.approx(expected, abs=1e-5)
    assert actual.tolist() == pytest.approx([0.546727, 0.778701], abs=1e-5)


def test_ssim_of_a_perfect_copy_is_one_and_runs_in_fp32_under_autocast() -> None:
    pixels = clips()
    assert ssim_of(pixels, pixels).tolist() == pytest.approx([1, 1], abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim_of(pixels, clips(seed=1))
    assert torch.equal(inside, ssim_of(pixels, clips(seed=1)))


def test_ssim_needs_frames_of_at_least_one_window() -> None:
    assert ssim_of(clips(height=11, width=11), clips(height=11, width=11)).shape == (2,)
    with pytest.raises(ValueError, match="10x16 are too small for SSIM"):
        ssim_of(clips(height=10), clips(height=10))


def test_flicker_of_constant_alternating_and_local_errors() -> None:
    pixels = clips(count=3, frames=4) // 2 + 20
    video = pixels.clone()
    video[0] += 15
    video[1, ::2] += 7
    # The error is in half of one frame of four, so it changes from the frame before and to the frame after.
    video[2, 2, :10] += 6
    assert flicker_of(pixels, video).tolist() == pytest.approx([0, 7, 0.5 * (0 + 6 + 6) / 3])


def test_flicker_does_not_overflow_and_is_zero_for_single_frames() -> None:
    black_white = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 4, 4, 3)
    assert flicker_of(black_white, black_white.flip(1)).tolist() == [510]
    assert flicker_of(clips(frames=1), clips(frames=1, seed=1)).tolist() == [0, 0]


@pytest.mark.parametrize("measure", [psnr_of, ssim_of, flicker_of])
def test_clips_of_other_dtypes_and_shapes_are_refused(measure: Any) -> None:
    pixels = clips()
    with pytest.raises(ValueError, match="float32"):
        measure(pixels, pixels.float())
    with pytest.raises(ValueError, match="do not match"):
        measure(pixels, pixels[:, :2])
    with pytest.raises(ValueError, match="clips, frames"):
        measure(pixels[0], pixels[0])


def test_bits_per_pixel() -> None:
    """The first case: 8x8x8 codes of 10 bits for 16 frames of 64x64."""
    assert bits_per_pixel(8 * 8 * 8, [1024], 16 * 64 * 64) == pytest.approx(10 / 128)
    assert bits_per_pixel(8 * 8 * 8, [1024, 32], 16 * 64 * 64) == pytest.approx(15 / 128)
    assert bits_per_pixel(100, [1], 64) == 0
    with pytest.raises(ValueError, match="got 1 places, .*2.* 0 pixels"):
        bits_per_pixel(1, [2], 0)


def with_moments(mean_D: Tensor, covariance_DD: Tensor, count: int, seed: int) -> Tensor:
    """Return samples with exactly this mean and covariance."""
    features = torch.randn(count, len(mean_D), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    white = features - features.mean(0)
    white = torch.linalg.qr(white).Q * math.sqrt(count - 1)
    return white @ torch.linalg.cholesky(covariance_DD).T + mean_D


def covariance(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size + 0.1 * torch.eye(size)


def test_frechet_distance_of_independent_dimensions_has_a_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    mean = torch.tensor([0.0, 3.0, 4.0]).double()
    actual = frechet_distance(with_moments(0 * mean, a.diag(), 50, 0), with_moments(mean, b.diag(), 80, 1))
    assert actual == pytest.approx(25 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rel=1e-10)


def test_frechet_distance_equals_that_with_a_matrix_root() -> None:
    a, b, mean = covariance(12, 0), covariance(12, 1), torch.arange(12).double()
    expected = mean.square().sum() + (a + b).trace() - 2 * np.trace(sqrtm((a @ b).numpy())).real
    actual = frechet_distance(with_moments(0 * mean, a, 200, 0), with_moments(mean, b, 40, 1))
    assert actual == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_is_exact_with_fewer_samples_than_features() -> None:
    """With two samples each, covariances have rank one along u and v, so tr((A B)^(1/2)) = |A| |B| |cos(u, v)|."""
    u, v = torch.zeros(2, 400, dtype=torch.float64)
    u[0], v[0], v[1] = 1, 0.6, 0.8
    # Variances 2 * 3^2 and 2 * 5^2.
    a, b = torch.stack([u, -u]) * 3, torch.stack([v, -v]) * 5
    assert frechet_distance(a, b) == pytest.approx(18 + 50 - 2 * math.sqrt(18 * 50) * 0.6, rel=1e-12)
    many = torch.randn(20, 400, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(many, many) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(many, many + 0.5) == pytest.approx(400 * 0.25, rel=1e-6)


def test_frechet_distance_refuses_invalid_features() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="1 and 4 samples"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.zeros(4, 3), torch.full((4, 3), torch.nan))


class TinyDetector(nn.Module):
    """Has the arguments of the published I3D, and returns statistics of its input."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale or not resize or not return_features:
            raise RuntimeError("unexpected arguments")
        return torch.stack([x[:, 0].mean((1, 2, 3)), x[:, 2].amax((1, 2, 3)), x[:, :, 0].mean((1, 2, 3))], 1)


class OtherProgram(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_detector_is_not_loaded_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "i3d_torchscript.pt"
    with pytest.raises(ValueError, match="no such file.*i3d_torchscript.pt"):
        load_detector(file, trust=True)
    torch.jit.script(TinyDetector()).save(str(file))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(
        ValueError, match="contains code that runs when it is loaded; pass --trust if you trust its origin"
    ):
        load_detector(file, trust=False)


def test_a_detector_gets_videos_in_the_format_of_the_published_one(tmp_path: Path) -> None:
    torch.jit.script(TinyDetector()).save(str(tmp_path / "i3d_torchscript.pt"))
    detector = load_detector(tmp_path / "i3d_torchscript.pt", trust=True)
    pixels = clips(count=6, frames=10)
    video = pixels.double() / 127.5 - 1
    expected = torch.stack(
        [video[..., 0].mean((1, 2, 3)), video[..., 2].amax((1, 2, 3)), video[:, 0].mean((1, 2, 3))], 1
    )
    assert torch.allclose(detector(pixels), expected.float(), atol=1e-6)
    assert isinstance(detector, VideoDetector) and not detector.training
    with pytest.raises(ValueError, match="9 frames are too short"):
        detector(pixels[:, :9])
    with pytest.raises(ValueError, match="float32"):
        detector(pixels.float())


def test_files_other_than_a_detector_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"PK broken")
    torch.jit.script(OtherProgram()).save(str(tmp_path / "other.pt"))
    for name, reason in (("broken.pt", "does not load as TorchScript"), ("other.pt", "not the published I3D")):
        with pytest.raises(ValueError, match=reason) as refusal:
            load_detector(tmp_path / name, trust=True)
        assert "\n" not in str(refusal.value)
