"""Device of a run: process group, precision, cores, compiler check, peak matmul throughput."""

import os
import platform
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from pipelines.engine.sharding import configured_sharding, shard_on_cpu
from pipelines.settings.training import Precision

TIMEOUT = timedelta(hours=2)
"""Time after which a process that waits for the others ends with an error. One process may check a large cache meanwhile."""


def start_accelerator(precision: str = "fp32", **settings: Any) -> Accelerator:
    """Start the process group; choose device and autocast precision. `settings` are further arguments of Accelerator."""
    timeout = InitProcessGroupKwargs(timeout=TIMEOUT)
    mixed = "bf16" if precision == "bf16" else "no"
    sharding = configured_sharding()
    accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[timeout], fsdp_plugin=sharding, **settings)
    if sharding is not None:
        shard_on_cpu(accelerator, sharding)
    # Launchers set one thread per process, which leaves cores idle.
    if accelerator.device.type == "cpu":
        torch.set_num_threads(cores(accelerator))
    return accelerator


def cores(accelerator: Accelerator) -> int:
    """Return the number of CPU cores for each process on this machine, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def resolve_precision(precision: Precision) -> Literal["fp32", "bf16"]:
    """Resolve `auto`: bf16 on GPUs with native bf16 and on CPUs with bf16 matrix instructions, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Private functions, missing in some versions of torch.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in names) else "fp32"


def device_name(device: torch.device) -> str:
    """Return the name of the hardware, to be recorded with measurements."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def check_compiler(device: torch.device) -> None:
    """Raise a ValueError if torch.compile does not work on this machine."""
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.ones(4, device=device))
    # A missing or broken toolchain raises many types of errors.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"--compile does not work here: {reason}") from None


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the peak matmul throughput in FLOP/s, on square matrices of 512 to 8192 columns or until a product takes 0.1 s."""
    best, side, seconds = 0.0, 512, 0.0
    while side <= 8192 and seconds < 0.1:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = min(_seconds(a, b, device) for _ in range(5))
        best = max(best, 2 * side**3 / seconds)
        side *= 2
    return best


def wait(device: torch.device) -> None:
    """Wait until all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(a: Tensor, b: Tensor, device: torch.device) -> float:
    began = time.perf_counter()
    F.linear(a, b)
    wait(device)
    return time.perf_counter() - began
