"""Mean losses over some rows of a cache, shared by several processes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from data.loading import Batch

BATCH = 32
"""Clips of a batch."""


def validate(
    accelerator: Accelerator,
    module: Callable[[Batch], Mapping[str, Tensor]],
    rows: Sequence[int],
    read: Callable[[Sequence[int]], Batch],
) -> dict[str, float]:
    """Return the mean losses over some rows. Each row counts once, on any number of processes.

    Args:
        module: maps a batch to losses, each a mean over the clips of the batch.
        read: maps up to `BATCH` rows to their batch.
    """
    own_rows = rows[accelerator.process_index :: accelerator.num_processes]
    # Process 0 has the most rows.
    most_rows = len(rows[:: accelerator.num_processes])
    total: dict[str, Tensor] = {}
    # MPS has no float64.
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    for first in range(0, most_rows, BATCH):
        part = own_rows[first : first + BATCH]
        # FSDP needs the same number of forward passes on all ranks: a process without rows evaluates a clip with weight 0.
        for key, value in module(send_to_device(read(part or rows[:1]), accelerator.device)).items():
            total[key] = total.get(key, 0) + value.to(dtype) * len(part)
    return {key: round(accelerator.reduce(value, "sum").item() / len(rows), 5) for key, value in total.items()}
