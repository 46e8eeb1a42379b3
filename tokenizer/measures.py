"""Metrics of reconstruction quality and codebook usage.

Legend: B clips, T H W C frames, height, width, colours; V codes of a vocabulary; G codes of a place; N samples,
D features, R rows.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.base import check_pixels, to_float
from tokenizer.messages import one_line, require_trust

_SSIM_WINDOW = 11
_DETECTOR_FRAMES = 10
"""Smallest number of frames for I3D, which halves the time axis three times and then pools over two positions."""
_DETECTOR_ARGUMENTS = ("rescale", "resize", "return_features")
_DETECTOR_CLIPS = 4
"""Clips per pass of I3D, which enlarges each frame to 224x224."""


def psnr(squared_error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB for a mean squared error of videos in [-1, 1]."""
    return 10 * torch.log10(4 / squared_error.clamp_min(1e-10))


def psnr_of(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> Tensor:
    """Return the PSNR of each clip in dB, (B,), from the mean squared error over all its frames; 106 dB for a perfect copy.

    Raises:
        ValueError: if clips are not uint8, or their shapes differ.
    """
    _check_clips(pixels_BTHWC, video_BTHWC)
    # One clip at a time, since floats take four times the memory of uint8.
    pairs = zip(pixels_BTHWC, video_BTHWC, strict=True)
    return psnr(torch.stack([(to_float(a_THWC) - to_float(b_THWC)).square().mean() for a_THWC, b_THWC in pairs]))


def ssim_of(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> Tensor:
    """Return the structural similarity (SSIM) of each clip, (B,), in [-1, 1], averaged over frames; 1 for a perfect copy.

    The parameters are those of Wang et al. 2004 (IEEE TIP 13(4)): a Gaussian window of 11x11 with sigma 1.5, K1 0.01,
    K2 0.03, data range 0..255, and only windows that lie within the frame. The SSIM of R, G and B is averaged. The
    computation is in fp32, also under autocast.

    Raises:
        ValueError: if clips are not uint8, their shapes differ, or height or width is below 11 pixels, the window size.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_clips(pixels_BTHWC, video_BTHWC)
    height, width = pixels_BTHWC.shape[2:4]
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(f"frames of {height}x{width} are too small for SSIM, whose window is 11x11")
    similarities = []
    # torchmetrics pads frames by reflection. Its own mean would include windows that reach into the padding.
    inside = slice(_SSIM_WINDOW // 2, -(_SSIM_WINDOW // 2))
    with torch.autocast(pixels_BTHWC.device.type, enabled=False):
        for clips in zip(video_BTHWC, pixels_BTHWC, strict=True):
            video_TCHW, pixels_TCHW = (rearrange(clip.float(), "t h w c -> t c h w") for clip in clips)
            _, map_TCHW = structural_similarity_index_measure(
                video_TCHW, pixels_TCHW, sigma=1.5, data_range=255.0, k1=0.01, k2=0.03, return_full_image=True
            )
            similarities.append(map_TCHW[..., inside, inside].mean())
    return torch.stack(similarities)


def flicker_of(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> Tensor:
    """Return the flicker of each reconstructed clip, (B,), in grey levels of 0..255.

    Flicker is the mean absolute difference between the frame-to-frame differences of reconstruction and input. It is 0
    for an error that is the same in all frames, and for clips of one frame.

    Raises:
        ValueError: if clips are not uint8, or their shapes differ.
    """
    _check_clips(pixels_BTHWC, video_BTHWC)
    if pixels_BTHWC.shape[1] == 1:
        return torch.zeros(len(pixels_BTHWC), device=pixels_BTHWC.device)
    extra_BTHWC = video_BTHWC.short().diff(dim=1) - pixels_BTHWC.short().diff(dim=1)
    return extra_BTHWC.abs().float().mean((1, 2, 3, 4))


def count_codes(codes: Tensor, vocabularies: Sequence[int]) -> list[Tensor]:
    """Return the counts (V,) of each code of a place. With several codes per place, they are the last axis of `codes`."""
    pairs = zip(codes.reshape(-1, len(vocabularies)).unbind(1), vocabularies, strict=True)
    return [torch.bincount(codes_N, minlength=size) for codes_N, size in pairs]


def code_health(counts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return metrics of codebook usage from the counts (V,) of each code of a place.

    The metrics are `code_usage`, the fraction of all vocabularies in use; `dead_codes`, the number of unused codes; and
    `perplexity`, the exponential of the entropy of a code, averaged over the codes of a place.
    """
    shares = [counts_V.double() / counts_V.sum().clamp_min(1) for counts_V in counts]
    entropies = [-(share_V * share_V.clamp_min(1e-30).log()).sum() for share_V in shares]
    used_V = torch.cat(list(counts)) > 0
    return {
        "code_usage": used_V.double().mean(),
        "dead_codes": (~used_V).sum().double(),
        "perplexity": torch.stack(entropies).mean().exp(),
    }


def bits_per_pixel(places: int, vocabularies: Sequence[int], pixels: int) -> float:
    """Return the bits per pixel of fixed-length codes, without entropy coding; `pixels` is frames x height x width.

    Raises:
        ValueError: if a number is below 1.
    """
    if min(places, *vocabularies, pixels) < 1:
        raise ValueError(f"numbers must be at least 1, got {places} places, {vocabularies} codes and {pixels} pixels")
    return places * sum(map(math.log2, vocabularies)) / pixels


def frechet_distance(a_ND: Tensor, b_ND: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of features (arXiv 1706.08500, eq. 6).

    The distance is |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A and B. Let X and Y be the centred
    features divided by sqrt(N - 1), so that A = X'X and B = Y'Y. Then tr((A B)^(1/2)) is the sum of the singular values
    of X Y'. This needs neither a covariance nor a matrix root. It is exact also for fewer samples than features (N < D),
    where A and B are singular and iterative matrix roots fail. Computed in double precision.

    Raises:
        ValueError: if the numbers of features differ, a set has fewer than two samples, or a value is not finite.
    """
    sets = [features.detach().cpu().double() for features in (a_ND, b_ND)]
    if any(features.ndim != 2 or features.shape[1] != sets[0].shape[-1] for features in sets):
        shapes = f"{tuple(a_ND.shape)} and {tuple(b_ND.shape)}"
        raise ValueError(f"features have shapes {shapes}, expected (samples, features) with equal numbers of features")
    if min(len(features) for features in sets) < 2:
        raise ValueError(f"{len(a_ND)} and {len(b_ND)} samples: a Frechet distance needs two or more of each")
    if not all(features.isfinite().all() for features in sets):
        raise ValueError("the Frechet distance is undefined: features are not finite")
    means_D = [features.mean(0) for features in sets]
    centred = [(f - mean_D) / math.sqrt(len(f) - 1) for f, mean_D in zip(sets, means_D, strict=True)]
    # The factor R of a QR decomposition has the same covariance as the features, and at most D rows.
    x_RD, y_RD = (torch.linalg.qr(features, mode="r").R for features in centred)
    root = torch.linalg.svdvals(x_RD @ y_RD.T).sum()
    traces = sum(features.square().sum() for features in centred)
    return max(0.0, float((means_D[0] - means_D[1]).square().sum() + traces - 2 * root))


class VideoDetector(nn.Module):
    """Network whose features give rFVD (arXiv 1812.01717), the `frechet_distance` between clips and reconstructions.

    Args:
        program: called as `program(video_BCTHW, rescale=False, resize=True, return_features=True)` with float videos
            in [-1, 1]; returns features (B, D).
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    @torch.no_grad()
    def forward(self, pixels_BTHWC: Tensor) -> Tensor:
        """Return features (B, D) of clips, uint8 (B, T, H, W, 3), in fp32; the published I3D has D = 400.

        Raises:
            ValueError: if clips are not uint8, or have fewer than 10 frames, which I3D cannot pool.
        """
        check_pixels(pixels_BTHWC)
        frames = pixels_BTHWC.shape[1]
        if frames < _DETECTOR_FRAMES:
            raise ValueError(f"clips of {frames} frames are too short for rFVD: I3D needs {_DETECTOR_FRAMES} or more")
        with torch.autocast(pixels_BTHWC.device.type, enabled=False):
            parts = pixels_BTHWC.split(_DETECTOR_CLIPS)
            videos = (rearrange(to_float(part_BTHWC), "b t h w c -> b c t h w") for part_BTHWC in parts)
            features = [self.program(video, rescale=False, resize=True, return_features=True) for video in videos]
        return torch.cat(features)


def load_detector(file: Path, trust: bool) -> VideoDetector:
    """Load the published I3D detector, `i3d_torchscript.pt`, on the CPU and in evaluation mode.

    Raises:
        ValueError: if `trust` is False, since TorchScript contains code, or if the file is missing or not the detector.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; rFVD needs the published I3D detector, i3d_torchscript.pt")
    require_trust(file, trust)
    try:
        program = torch.jit.load(str(file), map_location="cpu")
        arguments = {argument.name for argument in program.forward.schema.arguments}
    # torch raises exceptions of many types, depending on what is wrong with the file.
    except Exception as error:
        raise ValueError(f"{file}: does not load as TorchScript: {one_line(error)}") from error
    if not arguments.issuperset(_DETECTOR_ARGUMENTS):
        raise ValueError(f"{file}: not the published I3D, which has the arguments {', '.join(_DETECTOR_ARGUMENTS)}")
    return VideoDetector(program).eval().requires_grad_(False)


def _check_clips(pixels_BTHWC: Tensor, video_BTHWC: Tensor) -> None:
    check_pixels(pixels_BTHWC)
    check_pixels(video_BTHWC)
    clips, reconstructions = tuple(pixels_BTHWC.shape), tuple(video_BTHWC.shape)
    if clips != reconstructions:
        raise ValueError(f"clips of shape {clips} and reconstructions of shape {reconstructions} do not match")
