"""Telling two clips of one video from clips of others (NT-Xent, arXiv 2002.05709), over all processes as over one.

Legend: B videos of this process, G videos of all processes, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def nt_xent(first_BD: Tensor, second_BD: Tensor, temperature: float, video_B: Tensor | None = None) -> Tensor:
    """Mean over this process's videos of the cross-entropy of finding a clip's partner among all clips of other videos, both
    ways added up.

    Its mean over processes is the loss of one process with all videos, and so is its gradient under DistributedDataParallel.
    `video_B` (int64): numbers of the videos; without it all are different.

    Raises:
        ValueError: if there is one video only, which has nothing to be told from.
    """
    with torch.autocast(first_BD.device.type, enabled=False):
        first_BD, second_BD = F.normalize(first_BD.float(), dim=1), F.normalize(second_BD.float(), dim=1)
        first_GD, second_GD = _of_all(first_BD), _of_all(second_BD)
        videos, place = len(first_GD), torch.arange(len(first_BD), device=first_BD.device)
        if videos < 2:
            raise ValueError("clips of one video have nothing to be told from: batch_size must be at least 2")
        place = place + (dist.get_rank() * len(first_BD) if dist.is_initialized() else 0)
        everything_ED = torch.cat([first_GD, second_GD])
        video_B = place if video_B is None else video_B
        same_BE = video_B[:, None] == _of_all(video_B[:, None])[:, 0].repeat(2)  # itself, and a video that comes twice
        losses = []
        for own_BD, partner_B in ((first_BD, place + videos), (second_BD, place)):
            hidden_BE = same_BE.scatter(1, partner_B[:, None], False)
            likeness_BE = (own_BD @ everything_ED.T / temperature).masked_fill(hidden_BE, float("-inf"))
            losses.append(F.cross_entropy(likeness_BE, partner_B))
        return torch.stack(losses).sum()


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch normalisation by the statistics of all processes, which must have equally many samples, on CPUs too."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x_BD, world = input.float(), dist.get_world_size()
        mean_D = _Sum.apply(x_BD.mean(0)) / world
        variance_D = _Sum.apply((x_BD - mean_D).square().mean(0)) / world
        with torch.no_grad():
            n = len(x_BD) * world
            self.running_mean.lerp_(mean_D, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance_D * n / (n - 1), self.momentum)  # type: ignore[union-attr, arg-type]
        return (x_BD - mean_D) * (variance_D + self.eps).rsqrt() * self.weight + self.bias


def _of_all(x_BD: Tensor) -> Tensor:
    """Rows of all processes in their order, with gradients to each."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x_BD
    rank, world, rows = dist.get_rank(), dist.get_world_size(), len(x_BD)
    return _Sum.apply(F.pad(x_BD, (0, 0, rank * rows, (world - 1 - rank) * rows)))


class _Sum(torch.autograd.Function):
    """The sum over processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.forward(ctx, g)
