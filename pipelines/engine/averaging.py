"""A second copy of a module's weights: the average of those that training goes through."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage:
    """Exponential moving average of a module's weights; its buffers, as codebooks, are those of the last step.

    Early on it is shorter, (1 + n) / (10 + n) after n steps, so that the first weights are soon forgotten. Codebooks are
    averages already, and a code that was revived is not to be averaged with the dead one that it replaced.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self._source = source

        @torch.no_grad()
        def average(averages: Sequence[Tensor], weights: Sequence[Tensor], steps: Tensor | int) -> None:
            kept = min(decay, (1 + float(steps)) / (10 + float(steps)))
            for averaged, weight in zip(averages, weights, strict=True):
                averaged.lerp_(weight, 1 - kept)

        self.state = AveragedModel(source, multi_avg_fn=average).eval()
        """The average, with the number of steps it is of: what a checkpoint keeps."""

    @property
    def module(self) -> nn.Module:
        """The module with the averaged weights."""
        return self.state.module

    def update(self) -> None:
        """Take in the weights as they are now."""
        self.state.update_parameters(self._source)
