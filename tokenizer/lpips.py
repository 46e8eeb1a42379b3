"""LPIPS (arXiv 1801.03924): perceptual distance of two images, computed on features of VGG16 (arXiv 1409.1556).

Nothing is downloaded: the user gives a folder with the two files of published weights.

Legend: N images, C channels, H W height, width.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.messages import one_line

Shapes = dict[str, tuple[int, ...]]
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices of the convolutions in torchvision's `features`, for the five stages of VGG16. Pooling is between the stages."""
_CHANNELS = (64, 128, 256, 512, 512)
_LINEAR_SHAPES: Shapes = {f"lin{stage}.model.1.weight": (1, channels, 1, 1) for stage, channels in enumerate(_CHANNELS)}
_VGG = "VGG16, published with torchvision as vgg16-397923af.pth"
_LINEAR = "LPIPS's linear layers for VGG16, published in the authors' PerceptualSimilarity repository as v0.1/vgg.pth"


def _vgg_shapes() -> Shapes:
    shapes: Shapes = {}
    before = 3
    for layers, channels in zip(_STAGES, _CHANNELS, strict=True):
        for layer in layers:
            shapes |= {f"features.{layer}.weight": (channels, before, 3, 3), f"features.{layer}.bias": (channels,)}
            before = channels
    return shapes


class LPIPS(nn.Module):
    """Distance of images: weighted squared difference of unit-length features, mean over positions, sum over stages.

    The weights get no gradients, and `train` has no effect. The weights are not in the state dicts of parent modules, since
    they are published files. They are parameters and not buffers, because distributed training broadcasts parameters once
    but buffers before every step. The argument `weights` has the published names; `load_lpips` reads it from files.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name in (*_vgg_shapes(), *_LINEAR_SHAPES):
            weight = weights[name].float()
            # channels_last is up to 20 % faster on CPUs.
            if weight.ndim == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            self.register_parameter(name.replace(".", "_"), nn.Parameter(weight, requires_grad=False))
        # Mean and standard deviation of ImageNet colours, scaled from [0, 1] to [-1, 1] and rounded as in LPIPS 0.1.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.training = False

    def forward(self, a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
        """Return distances (N,) of RGB images in [-1, 1], float (N, 3, H, W); gradients flow to both images.

        Under autocast the convolutions run in the autocast dtype; norms, differences and means in at least fp32.

        Raises:
            ValueError: if images have another dtype or shape, or a side below 16 pixels (VGG16 halves images four times).
        """
        _check_images(a_NCHW, b_NCHW)
        distance_N = a_NCHW.new_zeros(len(a_NCHW))
        pairs = zip(self._features(a_NCHW), self._features(b_NCHW), strict=True)
        for stage, (a_NChw, b_NChw) in enumerate(pairs):
            linear_1C11 = self.get_parameter(f"lin{stage}_model_1_weight")
            difference_NChw = (_unit_length(a_NChw) - _unit_length(b_NChw)).square()
            distance_N = distance_N + (difference_NChw * linear_1C11).sum(1).mean((1, 2))
        return distance_N

    def train(self, mode: bool = True) -> "LPIPS":
        """Do nothing: the module is always in evaluation mode."""
        return self

    def _features(self, image_NCHW: Tensor) -> list[Tensor]:
        """Return the activations after the last convolution of each stage."""
        x_NCHW = (image_NCHW - self.mean) / self.deviation
        features: list[Tensor] = []
        for layers in _STAGES:
            if features:
                x_NCHW = F.max_pool2d(x_NCHW, 2)
            for layer in layers:
                weight, bias = (self.get_parameter(f"features_{layer}_{kind}") for kind in ("weight", "bias"))
                x_NCHW = F.relu(F.conv2d(x_NCHW, weight, bias, padding=1), inplace=True)
            features.append(x_NCHW)
        return features

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Do nothing: published weights are not saved in checkpoints."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Do nothing, since nothing was saved."""


def load_lpips(folder: Path) -> LPIPS:
    """Load LPIPS from the two published files in a folder: `vgg16-397923af.pth` (or one other `vgg16*.pth`) and `vgg.pth`.

    Only tensors are read; code in the files does not run. `classifier.*` of VGG16 is ignored. Copies of `vgg.pth` with
    additional `net.*` or `scaling_layer.*` are refused, since they could define another distance.

    Raises:
        ValueError: if the folder or a file is missing, or a file holds anything but the published tensors.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; LPIPS needs a folder with {_VGG}, and {_LINEAR}")
    vgg_file, linear_file = _vgg_file(folder), folder / "vgg.pth"
    if not linear_file.is_file():
        raise ValueError(f"{linear_file}: no such file; it is {_LINEAR}")
    vgg = _read_tensors(vgg_file, _vgg_shapes(), _VGG, ignored=("classifier.",))
    return LPIPS(vgg | _read_tensors(linear_file, _LINEAR_SHAPES, _LINEAR))


def _vgg_file(folder: Path) -> Path:
    published = folder / "vgg16-397923af.pth"
    files = [published] if published.is_file() else sorted(folder.glob("vgg16*.pth"))
    if not files:
        raise ValueError(f"{published}: no such file; it is {_VGG}")
    if len(files) > 1:
        raise ValueError(f"{folder}: {', '.join(file.name for file in files)}: keep one of them, {_VGG}")
    return files[0]


def _read_tensors(file: Path, shapes: Shapes, content: str, ignored: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read tensors of exactly these names and shapes; names with an `ignored` prefix are dropped."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    # torch raises exceptions of many types, depending on what is wrong with the file.
    except Exception as error:
        raise ValueError(f"{file}: does not load as tensors: {one_line(error)}") from error
    named = isinstance(tensors, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items())
    if not named:
        raise ValueError(f"{file}: holds something other than tensors by name")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ignored)}
    errors = [f"{name} is missing" for name in shapes if name not in tensors]
    errors += [f"{name} is not part of it" for name in tensors if name not in shapes]
    errors += [
        f"{name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and (tuple(tensors[name].shape) != shape or not tensors[name].is_floating_point())
    ]
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise ValueError(f"{file}: {errors[0]}{more}; expected {content}")
    return tensors


def _check_images(a_NCHW: Tensor, b_NCHW: Tensor) -> None:
    for image in (a_NCHW, b_NCHW):
        if not image.is_floating_point() or image.ndim != 4 or image.shape[1] != 3 or image.shape != a_NCHW.shape:
            shapes = f"{a_NCHW.dtype} {tuple(a_NCHW.shape)} and {b_NCHW.dtype} {tuple(b_NCHW.shape)}"
            raise ValueError(f"images are {shapes}, expected equal float shapes (images, 3, height, width)")
    height, width = a_NCHW.shape[2:]
    if min(height, width) < 16:
        raise ValueError(f"images of {height}x{width} are too small: LPIPS needs 16x16 or more")


def _unit_length(x_NChw: Tensor) -> Tensor:
    """Normalize the features of each position to length 1. All-zero features stay zero and get finite gradients."""
    x_NChw = x_NChw.to(torch.promote_types(x_NChw.dtype, torch.float32))
    return x_NChw / (torch.linalg.vector_norm(x_NChw, dim=1, keepdim=True) + 1e-10)
