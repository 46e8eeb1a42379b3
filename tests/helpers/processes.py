"""A function in several processes of a group."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = 240.0
Work = Callable[..., dict[str, Any]]


def in_processes(
    work: Work, count: int, folder: Path, *arguments: Any, before: Callable[[], Any] | None = None
) -> list[dict[str, Any]]:
    """What `work(rank, count, *arguments)` returns in each of so many processes of a group; a hang is an error.

    What `before` makes in each process before there is a group comes behind the arguments.
    """
    inputs = (work, count, str(folder), before, *arguments)
    context = torch.multiprocessing.spawn(_one, args=inputs, nprocs=count, join=False)
    deadline = time.monotonic() + _PATIENCE
    try:
        while not context.join(timeout=1, grace_period=5):
            assert time.monotonic() < deadline, f"{count} processes are not done after {_PATIENCE} seconds"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _one(rank: int, work: Work, count: int, folder: str, before: Callable[[], Any] | None, *arguments: Any) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    made = () if before is None else (before(),)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    torch.save(work(rank, count, *arguments, *made), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
