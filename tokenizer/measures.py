"""How well clips are reconstructed, and how healthy codes are.

Legend: B clips, T H W C frames, height, width, colours; V codes of the vocabulary; N samples, D features.
"""

import math
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.base import to_float

_SSIM_WINDOW = 11
_DETECTOR_FRAMES = 10
"""I3D halves time three times and pools the last two: shorter clips leave it nothing to pool."""
_DETECTOR_ARGUMENTS = ("rescale", "resize", "return_features")
_DETECTOR_CLIPS = 4
"""Clips at a time; it enlarges each frame to 224x224."""


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of videos in [-1, 1]."""
    return 10 * torch.log10(4 / squared_error.clamp_min(1e-10))


def psnr_of(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, (B,), of uint8 clips and their reconstructions.

    Of the mean squared error of all frames of a clip; 106 dB for a perfect copy.

    Raises:
        ValueError: for clips that are not uint8, or of two shapes.
    """
    _check_clips(pixels_BTHWC, video_BTHWC)
    pairs = zip(pixels_BTHWC, video_BTHWC, strict=True)  # clip by clip, for as floats they are large
    return psnr(torch.stack([(to_float(seen) - to_float(made)).square().mean() for seen, made in pairs]))


def ssim_of(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> Tensor:
    """Structural similarity of each clip, (B,), in -1..1, 1 for a perfect copy; mean over its frames.

    As its authors define it (Wang et al. 2004, IEEE TIP 13(4)): a gaussian window of 11x11 with sigma 1.5, K1 0.01,
    K2 0.03, data range 0..255, and only windows that lie within the frame. R, G and B are measured each on its own and
    averaged. In fp32, whatever autocast says.

    Raises:
        ValueError: for clips that are not uint8, of two shapes, or with a side under 11 pixels, less than one window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_clips(pixels_BTHWC, video_BTHWC)
    height, width = pixels_BTHWC.shape[2:4]
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(f"frames of {height}x{width} are too small for SSIM, whose window is 11x11")
    found = []
    inside = slice(
        _SSIM_WINDOW // 2, -(_SSIM_WINDOW // 2)
    )  # torchmetrics reflects frames at their border; its mean has that
    with torch.autocast(pixels_BTHWC.device.type, enabled=False):
        for clips in zip(video_BTHWC, pixels_BTHWC, strict=True):
            video_TCHW, pixels_TCHW = (rearrange(clip.float(), "t h w c -> t c h w") for clip in clips)
            _, map_TCHW = structural_similarity_index_measure(
                video_TCHW, pixels_TCHW, sigma=1.5, data_range=255.0, k1=0.01, k2=0.03, return_full_image=True
            )
            found.append(map_TCHW[..., inside, inside].mean())
    return torch.stack(found)


def flicker_of(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> Tensor:
    """Change from frame to frame that is not in the input, of each clip, (B,), in grey levels of 0..255.

    Mean absolute difference between the frame-to-frame differences of reconstruction and input; 0 for a constant error,
    however large, and for clips of one frame.

    Raises:
        ValueError: for clips that are not uint8, or of two shapes.
    """
    _check_clips(pixels_BTHWC, video_BTHWC)
    if pixels_BTHWC.shape[1] == 1:
        return torch.zeros(len(pixels_BTHWC), device=pixels_BTHWC.device)
    extra_BTHWC = video_BTHWC.short().diff(dim=1) - pixels_BTHWC.short().diff(dim=1)
    return extra_BTHWC.abs().float().mean((1, 2, 3, 4))


def code_health(counts_V: Tensor) -> dict[str, Tensor]:
    """`code_usage`: share of the vocabulary in use; `dead_codes`: how many are not; `perplexity`: two to the codes' entropy."""
    share_V = counts_V.double() / counts_V.sum().clamp_min(1)
    entropy = -(share_V * share_V.clamp_min(1e-30).log()).sum()
    used_V = counts_V > 0
    return {"code_usage": used_V.double().mean(), "dead_codes": (~used_V).sum().double(), "perplexity": entropy.exp()}


def bits_per_pixel(codes: int, vocab_size: int, pixels: int) -> float:
    """Rate of codes stored at fixed length, without entropy coding: bits per pixel (of three colours) of a clip.

    Args:
        codes: codes of a clip.
        vocab_size: values that a code can have.
        pixels: frames x height x width of a clip.

    Raises:
        ValueError: for counts that are not positive.
    """
    if min(codes, vocab_size, pixels) < 1:
        raise ValueError(f"{codes} codes of a vocabulary of {vocab_size} for {pixels} pixels: each must be 1 or more")
    return codes * math.log2(vocab_size) / pixels


def frechet_distance(a_ND: Tensor, b_ND: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (arXiv 1706.08500, eq. 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B being covariances. With A = X'X and B = Y'Y for centred
    features X, Y over the root of N - 1, the trace of the root of A B is the sum of the singular values of X Y'. So
    neither a covariance nor the root of a matrix is formed, and fewer samples than features (N < D), where A and B are
    singular and iterations for a root fail, are exact too. Double precision throughout.

    Raises:
        ValueError: for features of two widths, under two samples, or values that are not finite.
    """
    sets = [features.detach().cpu().double() for features in (a_ND, b_ND)]
    if any(features.ndim != 2 or features.shape[1] != sets[0].shape[-1] for features in sets):
        raise ValueError(
            f"features of shapes {tuple(a_ND.shape)} and {tuple(b_ND.shape)}, expected (samples, features)"
        )
    if min(len(features) for features in sets) < 2:
        raise ValueError(f"{len(a_ND)} and {len(b_ND)} samples: a Frechet distance needs two or more of each")
    if not all(features.isfinite().all() for features in sets):
        raise ValueError("features are not finite, so they have no Frechet distance")
    means_D = [features.mean(0) for features in sets]
    centred = [(f - mean_D) / math.sqrt(len(f) - 1) for f, mean_D in zip(sets, means_D, strict=True)]
    x_RD, y_RD = (torch.linalg.qr(features, mode="r").R for features in centred)  # same covariance, at most D rows
    root = torch.linalg.svdvals(x_RD @ y_RD.T).sum()
    traces = sum(features.square().sum() for features in centred)
    return max(0.0, float((means_D[0] - means_D[1]).square().sum() + traces - 2 * root))


class VideoDetector(nn.Module):
    """Features of clips for rFVD (arXiv 1812.01717): `frechet_distance` of those of clips and of their reconstructions.

    Args:
        program: called as `program(video_BCTHW, rescale=False, resize=True, return_features=True)` with float videos
            in [-1, 1]; returns (B, D).
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    @torch.no_grad()
    def forward(self, pixels_BTHWC: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> features (B, D), 400 of the published I3D. In fp32, whatever autocast says.

        Raises:
            ValueError: for clips that are not uint8, or of fewer than 10 frames, which I3D cannot pool.
        """
        _check_clips(pixels_BTHWC, pixels_BTHWC)
        frames = pixels_BTHWC.shape[1]
        if frames < _DETECTOR_FRAMES:
            raise ValueError(f"clips of {frames} frames are too short for rFVD: I3D needs {_DETECTOR_FRAMES} or more")
        with torch.autocast(pixels_BTHWC.device.type, enabled=False):
            features = [
                self.program(
                    rearrange(to_float(part), "b t h w c -> b c t h w"),
                    rescale=False,
                    resize=True,
                    return_features=True,
                )
                for part in pixels_BTHWC.split(_DETECTOR_CLIPS)
            ]
        return torch.cat(features)


def load_detector(file: Path, trust: bool) -> VideoDetector:
    """The published I3D detector, `i3d_torchscript.pt`, on the CPU and in evaluation mode.

    Raises:
        ValueError: without trust, since TorchScript is a program; or if the file is missing or something else.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; rFVD wants the published I3D detector, i3d_torchscript.pt")
    if not trust:
        raise ValueError(
            f"{file} is a program; it runs when it is loaded: pass --trust if you trust where it comes from"
        )
    try:
        program = torch.jit.load(str(file), map_location="cpu")
        arguments = {argument.name for argument in program.forward.schema.arguments}
    except Exception as error:  # of many types, by what is wrong with the file
        raise ValueError(f"{file}: does not load as TorchScript: {' '.join(str(error).split())[:200]}") from error
    if not arguments.issuperset(_DETECTOR_ARGUMENTS):
        raise ValueError(f"{file}: is not the published I3D: it does not take {', '.join(_DETECTOR_ARGUMENTS)}")
    return VideoDetector(program).eval().requires_grad_(False)


def _check_clips(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> None:
    for clips in (pixels_BTHWC, video_BTHWC):
        if clips.dtype != torch.uint8:
            raise ValueError(f"pixels are {clips.dtype}, expected uint8")
        if clips.ndim != 5 or clips.shape[-1] != 3:
            raise ValueError(f"pixels of shape {tuple(clips.shape)}, expected (clips, frames, height, width, 3)")
    if pixels_BTHWC.shape != video_BTHWC.shape:
        raise ValueError(
            f"clips of shape {tuple(pixels_BTHWC.shape)} and reconstructions of {tuple(video_BTHWC.shape)} do not match"
        )
