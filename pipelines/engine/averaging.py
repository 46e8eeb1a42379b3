"""Moving average of the weights of a module during training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage:
    """Exponential moving average (EMA) of the weights of a module. Buffers, such as codebooks, are copied, not averaged.

    After n steps the decay is at most (1 + n) / (10 + n), because the initial weights should soon lose their influence.
    Codebooks are moving averages already, and a revived code must not be averaged with the dead code that it replaced.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self._source = source

        @torch.no_grad()
        def average(averages: Sequence[Tensor], weights: Sequence[Tensor], steps: Tensor | int) -> None:
            current_decay = min(decay, (1 + float(steps)) / (10 + float(steps)))
            for averaged, weight in zip(averages, weights, strict=True):
                averaged.lerp_(weight, 1 - current_decay)

        self.state = AveragedModel(source, multi_avg_fn=average).eval()
        """Averaged weights and number of steps; saved in checkpoints."""

    @property
    def module(self) -> nn.Module:
        """Module with the averaged weights."""
        return self.state.module

    def update(self) -> None:
        """Add the current weights to the average."""
        self.state.update_parameters(self._source)
