"""Run a function in several processes of a process group."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.forked import START_METHOD

_TIMEOUT = 240.0
"""Seconds after which the processes count as hanging."""
Work = Callable[..., dict[str, Any]]


def in_processes(
    work: Work, count: int, folder: Path, *arguments: Any, before: Callable[[], Any] | None = None
) -> list[dict[str, Any]]:
    """Return the results of `work(rank, count, *arguments)` of all ranks. A hang is an error.

    If `before` is given, each process calls it before it joins the group, and passes its result as a last argument.
    """
    inputs = (work, count, str(folder), before, *arguments)
    context = torch.multiprocessing.start_processes(_one, inputs, count, join=False, start_method=START_METHOD)
    deadline = time.monotonic() + _TIMEOUT
    try:
        while not context.join(timeout=1, grace_period=5):
            assert time.monotonic() < deadline, f"{count} processes still run after {_TIMEOUT} seconds"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _one(rank: int, work: Work, count: int, folder: str, before: Callable[[], Any] | None, *arguments: Any) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    if before is not None:
        arguments = (*arguments, before())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    torch.save(work(rank, count, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
