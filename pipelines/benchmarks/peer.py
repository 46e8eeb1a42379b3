"""The tokenizer of magvit2-pytorch, the best known open one that trains from scratch, as something to measure beside.

It needs `pip install magvit2-pytorch`. That package imports torchvision, which the tokenizer uses for a perceptual loss only;
where torchvision is not installed an empty module stands in for it and the loss, which is switched off, is never called.
"""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

_STOOD_IN_FOR = ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.utils")
LAYERS = (
    "residual",
    "compress_space",
    "residual",
    "compress_space",
    "residual",
    "compress_space",
    "compress_time",
    "residual",
)
"""Stride 2x8x8. The layers of its README, of 86 M parameters, do three steps a minute on two cores; of those that we tried
there these and the settings below came furthest."""
CHANNELS, MOST_CHANNELS, LR, BATCH = 16, 128, 3e-3, 4


class _Absent(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Peer(nn.Module):
    """Its tokenizer of stride 2x8x8 with FSQ of 1,000 codes, trained on the squared error as ours is.

    Raises:
        ValueError: if the package is not installed.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if importlib.util.find_spec("torchvision") is None:
            for name in _STOOD_IN_FOR:
                sys.modules[name] = _Absent(name)
                sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
            for name in _STOOD_IN_FOR[1:]:
                setattr(sys.modules["torchvision"], name.split(".")[1], sys.modules[name])
            vars(sys.modules["torchvision.models"])["VGG16_Weights"] = type("VGG16_Weights", (), {"DEFAULT": None})
        try:
            from magvit2_pytorch import VideoTokenizer
        except ImportError as error:
            raise ValueError(f"the peer is not installed ({error}): pip install magvit2-pytorch") from None
        self.tokenizer = VideoTokenizer(
            image_size=size,
            init_dim=CHANNELS,
            max_dim=MOST_CHANNELS,
            use_fsq=True,
            fsq_levels=[8, 5, 5, 5],
            layers=LAYERS,
            use_gan=False,
            perceptual_loss_weight=0.0,
        )

    def forward(self, pixels_BTHWC: Tensor) -> Tensor:
        """The training loss."""
        loss, _ = self.tokenizer(_video(pixels_BTHWC), return_loss=True, video_contains_first_frame=False)
        return loss

    @torch.no_grad()
    def encode(self, pixels_BTHWC: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> codes."""
        return self.tokenizer(_video(pixels_BTHWC), return_codes=True, video_contains_first_frame=False)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float (B, T, H, W, 3) in about [-1, 1]."""
        video = self.tokenizer.decode_from_code_indices(codes, video_contains_first_frame=False)
        return rearrange(video, "b c t h w -> b t h w c")


def _video(pixels_BTHWC: Tensor) -> Tensor:
    return rearrange(pixels_BTHWC.float() / 127.5 - 1, "b t h w c -> b c t h w").contiguous()
