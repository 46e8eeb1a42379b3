"""Tokenizer of magvit2-pytorch (`pip install magvit2-pytorch`), the baseline of `tokenizer_quality`.

It is the best-known open tokenizer that can be trained from scratch. The package imports torchvision for a perceptual loss,
which is disabled here. If torchvision is not installed, stub modules replace it.
"""

import sys
import types
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

_STAND_INS = ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.utils")
LAYERS = ("residual", "compress_space") * 3 + ("compress_time", "residual")
"""Layers with a total stride of 2x8x8.

The layers in the package's README (86 M parameters) train at three steps per minute on two cores.
Of the smaller settings that were tried, these layers and the constants below gave the best PSNR.
"""
CHANNELS, MOST_CHANNELS, LR, BATCH = 16, 128, 3e-3, 4


class _StandIn(types.ModuleType):
    """Module whose attributes are functions that return None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _stand_in_for_torchvision() -> None:
    for name in _STAND_INS:
        sys.modules[name] = _StandIn(name)
        # importlib.util.find_spec, with which libraries look for torchvision, raises ValueError if `__spec__` is None.
        sys.modules[name].__spec__ = torch.__spec__
    for name in _STAND_INS[1:]:
        setattr(sys.modules["torchvision"], name.split(".")[1], sys.modules[name])
    vars(sys.modules["torchvision.models"])["VGG16_Weights"] = type("VGG16_Weights", (), {"DEFAULT": None})


class Peer(nn.Module):
    """VideoTokenizer of magvit2-pytorch: stride 2x8x8, FSQ with 1,000 codes, trained with the squared error only, like VQ3D.

    Raises:
        ValueError: if the package cannot be imported.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        try:
            import torchvision  # noqa: F401
        except ImportError:
            _stand_in_for_torchvision()
        try:
            from magvit2_pytorch import VideoTokenizer
        except (ImportError, RuntimeError) as error:
            # torchvision raises RuntimeError if it was built for another version of torch.
            raise ValueError(f"magvit2-pytorch cannot be imported ({error}): pip install magvit2-pytorch") from None
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
        """Return the training loss of uint8 clips (B, T, H, W, 3)."""
        loss, _ = self.tokenizer(_video(pixels_BTHWC), return_loss=True, video_contains_first_frame=False)
        return loss

    @torch.no_grad()
    def encode(self, pixels_BTHWC: Tensor) -> Tensor:
        """Encode uint8 clips (B, T, H, W, 3) to codes."""
        return self.tokenizer(_video(pixels_BTHWC), return_codes=True, video_contains_first_frame=False)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to float clips (B, T, H, W, 3), roughly in [-1, 1]."""
        video = self.tokenizer.decode_from_code_indices(codes, video_contains_first_frame=False)
        return rearrange(video, "b c t h w -> b t h w c")


def _video(pixels_BTHWC: Tensor) -> Tensor:
    return rearrange(pixels_BTHWC.float() / 127.5 - 1, "b t h w c -> b c t h w").contiguous()
