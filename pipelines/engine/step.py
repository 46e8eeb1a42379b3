"""One optimizer step. Training, `--plan` and the benchmarks share this code."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.loading import Batch
from pipelines.engine.sharding import whole

Losses = dict[str, Tensor]
"""Scalars by name: `loss` is minimised, all others are only logged."""


class SingleProcess:
    """Stand-in for the part of an Accelerator that a step needs: one process, no sharding, no gradient scaling."""

    is_fsdp2 = False

    def __init__(self, device: torch.device, bf16: bool) -> None:
        self._device_type, self._bf16 = device.type, bf16

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16)

    def no_sync(self, model: object) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)


def train_step(
    accelerator: Accelerator | SingleProcess,
    model: Callable[[Batch], Losses],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    accumulate: int = 1,
    clipped: Sequence[nn.Module] = (),
    max_norm: float = torch.inf,
    check_gradient: Callable[[Tensor, Losses], None] = lambda norms, losses: None,
) -> Losses:
    """Run the forward and backward pass of each part of a batch, clip the gradients, update the weights.

    Args:
        model: maps a batch to losses.
        batches: parts of the batch, on the device of the model.
        accumulate: number of parts; the loss of each part is divided by it.
        clipped: modules whose gradients are clipped to `max_norm`, each module by its own norm.
        check_gradient: called before the update with the norms (one per clipped module) and the losses; may raise or block it.

    Returns:
        Mean losses over the parts, detached.
    """
    mean_losses: Losses = {}
    for number, batch in enumerate(batches):
        # FSDP reduces the gradients after every part: no process has to hold a whole gradient.
        synchronise = number == accumulate - 1 or accelerator.is_fsdp2
        with nullcontext() if synchronise else accelerator.no_sync(model):
            with accelerator.autocast():
                losses = model(batch)
            # A non-finite loss on one rank makes the summed gradient NaN, so all ranks detect it.
            finite_or_nan = torch.where(losses["loss"].detach().isfinite(), 1.0, torch.nan)
            accelerator.backward(losses["loss"] * finite_or_nan / accumulate)
        for key, value in losses.items():
            mean_losses[key] = mean_losses.get(key, 0) + value.detach() / accumulate
        # Free the inputs of this part before the next part is loaded.
        del batch
    if clipped:
        norms = [whole(accelerator.clip_grad_norm_(module.parameters(), max_norm)) for module in clipped]
        check_gradient(torch.stack(norms), mean_losses)
    optimizer.step()
    optimizer.zero_grad()
    return mean_losses
