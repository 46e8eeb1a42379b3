"""Discriminators of clips, and how a tokenizer is trained against one.

Legend: B clips, C channels, T H W frames, height, width; t h w places that get a judgement of their own.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

DiscriminatorName = Literal["patch", "3d"]


class FrameDiscriminator(nn.Module):
    """taming's patch discriminator (arXiv 1611.07004, 2012.09841) on each frame by itself.

    One judgement sees 70x70 pixels. Batch norm takes its statistics from what is judged in one call, of one process.

    Raises:
        ValueError: if taming is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
        except ImportError as error:
            raise ValueError(
                "the patch discriminator needs the package taming-transformers-rom1504: "
                "pip install --no-deps taming-transformers-rom1504"
            ) from error
        self.layers = NLayerDiscriminator(input_nc=3, ndf=64, n_layers=3).apply(weights_init)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Videos in [-1, 1] -> logits (B, t, h, w), high for real ones."""
        _check_size(video_BCTHW, 24)
        logits = self.layers(rearrange(video_BCTHW, "b c t h w -> (b t) c h w"))
        return rearrange(logits, "(b t) 1 h w -> b t h w", b=len(video_BCTHW))


class VideoDiscriminator(nn.Module):
    """Four 3-D convolutions with spectral norm (arXiv 1802.05957), strides 1, 2, 2, 1 in time and 2, 2, 2, 1 in space.

    One judgement sees 17 frames of 38x38 pixels, zeros beyond the clip, which may be of one frame. Without batch norm,
    so the judgement of a clip depends on no other clip and on no other process.
    """

    def __init__(self) -> None:
        super().__init__()
        width, kernel = 64, (3, 4, 4)
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv3d(3, width, kernel, (1, 2, 2), padding=1)),
            nn.LeakyReLU(0.2, inplace=True),
            spectral_norm(nn.Conv3d(width, 2 * width, kernel, (2, 2, 2), padding=1)),
            nn.LeakyReLU(0.2, inplace=True),
            spectral_norm(nn.Conv3d(2 * width, 4 * width, kernel, (2, 2, 2), padding=1)),
            nn.LeakyReLU(0.2, inplace=True),
            spectral_norm(nn.Conv3d(4 * width, 1, 3, padding=1)),
        )

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Videos in [-1, 1] -> logits (B, t, h, w), high for real ones."""
        _check_size(video_BCTHW, 8)
        return rearrange(self.layers(video_BCTHW), "b 1 t h w -> b t h w")


def make_discriminator(kind: DiscriminatorName) -> nn.Module:
    """The discriminator of a name: (B, 3, T, H, W) in [-1, 1] -> logits (B, t, h, w).

    Raises:
        ValueError: if there is none, or its package is not installed.
    """
    if kind == "patch":
        return FrameDiscriminator()
    if kind == "3d":
        return VideoDiscriminator()
    raise ValueError(f"discriminator {kind!r} is neither patch nor 3d")


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What a discriminator minimises (arXiv 1705.02894), halved as taming does; 1 where it says 0 to everything."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


class Adversary(nn.Module):
    """A discriminator and both sides' losses, for one backward pass and one optimizer.

    Each loss reaches only the network that it is for: the generator's is of the discriminator as it is, a constant, the
    discriminator's of reconstructions without their past. So the sum of all losses gives each network the gradient that
    an optimizer of its own would see. Both move at the same moment, not in turns as taming's do.

    The discriminator learns from step 0, so that it knows its trade when the generator begins to listen (traps T25).

    Args:
        kind: as in `make_discriminator`.
        start: step from which on the generator listens.
        weight: of the generator's loss, relative to the reconstruction's by their gradients.
        cap: the most that weight may become. The ratio is huge while a discriminator is indifferent.

    Raises:
        ValueError: for a negative start, or a weight or cap that is not positive.
    """

    def __init__(self, kind: DiscriminatorName, *, start: int, weight: float, cap: float) -> None:
        super().__init__()
        if start < 0 or not weight > 0 or not cap > 0:
            raise ValueError(f"adversarial start {start} must be 0 or more, weight {weight} and cap {cap} positive")
        self.discriminator = make_discriminator(kind)
        self.start, self.weight, self.cap = start, weight, cap

    def forward(
        self,
        real_BCTHW: Tensor,
        fake_BCTHW: Tensor,
        reconstruction_loss: Tensor,
        last_layer: nn.Parameter,
        step: int,
    ) -> dict[str, Tensor]:
        """Losses of videos in [-1, 1] and their reconstructions: add `generator` and `discriminator` to the others.

        Args:
            reconstruction_loss: scalar of the same reconstructions, the measure of the adaptive weight.
            last_layer: the generator's last weight, where gradients are compared.
            step: of the training, from 0.

        Returns:
            `generator`: its loss, weighted, 0 before the start; `discriminator`: its hinge loss;
            `adversarial_weight`: the weight used, for the log.
        """
        generator, weight = reconstruction_loss.new_zeros(()), reconstruction_loss.new_zeros(())
        if step >= self.start:
            loss = -self._judged_by_a_constant(fake_BCTHW).float().mean()
            weight = self._adaptive_weight(reconstruction_loss, loss, last_layer)
            generator = weight * loss
        # Apart, as taming does: batch norm would let each side see the other's statistics.
        real_logits, fake_logits = self.discriminator(real_BCTHW), self.discriminator(fake_BCTHW.detach())
        return {
            "generator": generator,
            "discriminator": hinge_loss(real_logits, fake_logits),
            "adversarial_weight": weight,
        }

    def _judged_by_a_constant(self, fake_BCTHW: Tensor) -> Tensor:
        """Logits that give the discriminator no gradient and leave its running statistics and norms as they were."""
        constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        constant |= {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        return functional_call(self.discriminator, constant, (fake_BCTHW,))

    def _adaptive_weight(self, reconstruction_loss: Tensor, loss: Tensor, last_layer: nn.Parameter) -> Tensor:
        """Ratio of the gradients' lengths at the last layer (arXiv 2012.09841, eq. 7; 1e-4 as in its code), capped.

        Of the gradients' means over all processes, so that the weight does not depend on how many there are.
        """
        with torch.autocast(last_layer.device.type, enabled=False):
            gradients = torch.stack(
                [torch.autograd.grad(part, last_layer, retain_graph=True)[0] for part in (reconstruction_loss, loss)]
            )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gradients)
            gradients /= dist.get_world_size()
        reconstruction, adversarial = gradients.flatten(1).norm(dim=1)
        return (self.weight * reconstruction / (adversarial + 1e-4)).clamp(max=self.cap)


def _check_size(video_BCTHW: Tensor, least: int) -> None:
    height, width = video_BCTHW.shape[-2:]
    if min(height, width) < least:
        raise ValueError(f"frames of {height}x{width} are too small for this discriminator, which needs {least} pixels")
