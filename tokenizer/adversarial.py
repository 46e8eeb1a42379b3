"""Discriminators of video clips, and adversarial training of a tokenizer.

Legend: B clips, C channels, T H W frames, height, width; t h w the grid of logits.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from tokenizer.messages import NEEDS_TAMING

DiscriminatorName = Literal["patch", "3d"]


class FrameDiscriminator(nn.Module):
    """Patch discriminator of taming-transformers (arXiv 1611.07004, 2012.09841), applied to single frames.

    The receptive field of a logit is 70x70 pixels. Batch norm computes its statistics per call and per process.

    Raises:
        ValueError: if taming-transformers is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
        except ImportError as error:
            raise ValueError(f"the patch discriminator {NEEDS_TAMING}") from error
        self.layers = NLayerDiscriminator(input_nc=3, ndf=64, n_layers=3).apply(weights_init)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Return logits (B, T, h, w), high for real videos. Input: (B, 3, T, H, W) in [-1, 1], H and W at least 24."""
        _check_size(video_BCTHW, 24)
        logits = self.layers(rearrange(video_BCTHW, "b c t h w -> (b t) c h w"))
        return rearrange(logits, "(b t) 1 h w -> b t h w", b=len(video_BCTHW))


class VideoDiscriminator(nn.Module):
    """Four 3-D convolutions with spectral norm (arXiv 1802.05957), strides 1, 2, 2, 1 in time and 2, 2, 2, 1 in space.

    The receptive field of a logit is 17 frames of 38x38 pixels. Clips are padded with zeros, and one frame is enough.
    There is no batch norm, so the logits of a clip do not depend on other clips or processes.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width, stride in ((3, 64, (1, 2, 2)), (64, 128, 2), (128, 256, 2)):
            convolution = nn.Conv3d(channels, width, (3, 4, 4), stride, padding=1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv3d(256, 1, 3, padding=1)))

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Return logits (B, t, h, w), high for real videos. Input: (B, 3, T, H, W) in [-1, 1], H and W at least 8."""
        _check_size(video_BCTHW, 8)
        return rearrange(self.layers(video_BCTHW), "b 1 t h w -> b t h w")


def make_discriminator(kind: DiscriminatorName) -> nn.Module:
    """Return a discriminator that maps videos (B, 3, T, H, W) in [-1, 1] to logits (B, t, h, w).

    Raises:
        ValueError: if the kind is unknown, or its package is not installed.
    """
    if kind not in ("patch", "3d"):
        raise ValueError(f"discriminator must be patch or 3d, got {kind!r}")
    return FrameDiscriminator() if kind == "patch" else VideoDiscriminator()


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return half the hinge loss of a discriminator (arXiv 1705.02894), as in taming-transformers."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


class Adversary(nn.Module):
    """Discriminator and the losses of generator and discriminator, for one backward pass and one optimizer.

    Each loss sends gradients only to its own network: the generator loss treats the discriminator's weights as constants,
    and the discriminator loss uses detached reconstructions. One backward pass of the summed losses therefore gives each
    network the gradient of its own loss. Both networks are updated in the same step; taming-transformers updates them in
    turns.

    The discriminator is trained from step 0, so that its gradients are useful when the generator loss starts.

    Args:
        start: first step with a generator loss.
        weight: ratio of the two gradient norms at the last layer, weighted generator loss to reconstruction loss.
        cap: upper limit of the adaptive weight, which would be huge while the generator loss has gradients near zero.

    Raises:
        ValueError: if the start is negative, or the weight or the cap is not positive.
    """

    def __init__(self, kind: DiscriminatorName, *, start: int, weight: float, cap: float) -> None:
        super().__init__()
        if start < 0 or not weight > 0 or not cap > 0:
            raise ValueError(f"adversarial start must be >= 0, weight and cap > 0, got {start}, {weight} and {cap}")
        self.discriminator = make_discriminator(kind)
        self.start, self.weight, self.cap = start, weight, cap

    def forward(
        self, real_BCTHW: Tensor, fake_BCTHW: Tensor, reconstruction_loss: Tensor, last_layer: nn.Parameter, step: int
    ) -> dict[str, Tensor]:
        """Return the losses of videos in [-1, 1] and their reconstructions.

        Args:
            fake_BCTHW: reconstructions, not detached.
            reconstruction_loss: scalar loss of the same reconstructions, the reference for the adaptive weight.
            last_layer: weight of the generator's last layer, at which gradient norms are compared.
            step: training step, counted from 0.

        Returns:
            `generator`: weighted generator loss, 0 before the start; `discriminator`: hinge loss;
            `adversarial_weight`: current adaptive weight, for logging. The caller adds the two losses to the total loss.
        """
        generator, weight = reconstruction_loss.new_zeros(()), reconstruction_loss.new_zeros(())
        if step >= self.start:
            loss = -self._logits_with_constant_weights(fake_BCTHW).float().mean()
            weight = self._adaptive_weight(reconstruction_loss, loss, last_layer)
            generator = weight * loss
        # Two calls, because in one call batch norm would mix the statistics of real and reconstructed videos.
        real_logits = self.discriminator(real_BCTHW)
        fake_logits = self.discriminator(fake_BCTHW.detach())
        discriminator = hinge_loss(real_logits, fake_logits)
        return {"generator": generator, "discriminator": discriminator, "adversarial_weight": weight}

    def _logits_with_constant_weights(self, fake_BCTHW: Tensor) -> Tensor:
        """Return logits, without gradients for the discriminator's weights and without updates of its buffers."""
        constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        constant |= {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        return functional_call(self.discriminator, constant, (fake_BCTHW,))

    def _adaptive_weight(self, reconstruction_loss: Tensor, loss: Tensor, last_layer: nn.Parameter) -> Tensor:
        """Return the capped ratio of gradient norms at the last layer (arXiv 2012.09841, eq. 7; 1e-4 from its code).

        Gradients are averaged over all processes, so that all processes use the same weight.
        """
        with torch.autocast(last_layer.device.type, enabled=False):
            losses = reconstruction_loss, loss
            gradients = torch.stack([torch.autograd.grad(part, last_layer, retain_graph=True)[0] for part in losses])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gradients)
            gradients /= dist.get_world_size()
        reconstruction, adversarial = gradients.flatten(1).norm(dim=1)
        return (self.weight * reconstruction / (adversarial + 1e-4)).clamp(max=self.cap)


def _check_size(video_BCTHW: Tensor, least: int) -> None:
    height, width = video_BCTHW.shape[-2:]
    if min(height, width) < least:
        raise ValueError(f"frames of {height}x{width} are too small: this discriminator needs {least}x{least} or more")
