"""NT-Xent contrastive loss (arXiv 2002.05709) over the batch of all processes.

Legend: B videos of this process, G videos of all processes, E = 2 * G their clips, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def nt_xent(first_BD: Tensor, second_BD: Tensor, temperature: float, video_B: Tensor | None = None) -> Tensor:
    """Return the NT-Xent loss between two clips of each video, a scalar.

    The loss is the cross-entropy of identifying a clip's partner among the clips of all other videos, averaged over the videos
    of this process and summed over both directions. Averaged over processes, the loss and its gradient under
    DistributedDataParallel equal those of one process with all videos. Clips with the same index in `video_B` (int64) are not
    negatives of each other. Without `video_B`, all videos are distinct.

    Raises a ValueError if all processes together have only one video, because there are no negatives then.
    """
    with torch.autocast(first_BD.device.type, enabled=False):
        first_BD, second_BD = F.normalize(first_BD.float(), dim=1), F.normalize(second_BD.float(), dim=1)
        first_GD, second_GD = _gather(first_BD), _gather(second_BD)
        videos = len(first_GD)
        if videos < 2:
            raise ValueError("the contrastive loss needs negatives: batch_size must be at least 2, got 1")
        rank = dist.get_rank() if dist.is_initialized() else 0
        row_B = torch.arange(len(first_BD), device=first_BD.device) + rank * len(first_BD)
        clip_ED = torch.cat([first_GD, second_GD])
        video_B = row_B if video_B is None else video_B
        # Not negatives: the clip itself, its partner, and other clips of its video if that is in the batch twice.
        same_BE = video_B[:, None] == _gather(video_B[:, None])[:, 0].repeat(2)
        losses = []
        for own_BD, partner_B in ((first_BD, row_B + videos), (second_BD, row_B)):
            excluded_BE = same_BE.scatter(1, partner_B[:, None], False)
            logits_BE = (own_BD @ clip_ED.T / temperature).masked_fill(excluded_BE, float("-inf"))
            losses.append(F.cross_entropy(logits_BE, partner_B))
        return torch.stack(losses).sum()


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over all processes, which must have equal batch sizes. Unlike nn.SyncBatchNorm, it works on CPUs."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x_BD, world = input.float(), dist.get_world_size()
        mean_D = _AllReduce.apply(x_BD.mean(0)) / world
        variance_D = _AllReduce.apply((x_BD - mean_D).square().mean(0)) / world
        with torch.no_grad():
            n = len(x_BD) * world
            self.running_mean.lerp_(mean_D, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance_D * n / (n - 1), self.momentum)  # type: ignore[union-attr, arg-type]
        return (x_BD - mean_D) * (variance_D + self.eps).rsqrt() * self.weight + self.bias


def _gather(x_BD: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order, (G, D). Gradients flow back to every process."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x_BD
    rank, world, rows = dist.get_rank(), dist.get_world_size(), len(x_BD)
    return _AllReduce.apply(F.pad(x_BD, (0, 0, rank * rows, (world - 1 - rank) * rows)))


class _AllReduce(torch.autograd.Function):
    """Sum over processes, of values and of gradients. (torch.distributed.nn.functional.all_reduce is deprecated.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return _AllReduce.forward(ctx, g)
