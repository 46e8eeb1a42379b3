"""The device of a run: process group, precision, cores, compiler, speed of matrix products."""

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


def start_accelerator(precision: str = "fp32", **settings: Any) -> Accelerator:
    """Process group, device and precision. Nobody is given up for waiting while one process checks a large cache."""
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    mixed = "bf16" if precision == "bf16" else "no"
    sharding = configured_sharding()
    accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[patience], fsdp_plugin=sharding, **settings)
    if sharding is not None:
        shard_on_cpu(accelerator, sharding)
    if accelerator.device.type == "cpu":  # launchers set one thread per process, which halves a small machine
        torch.set_num_threads(cores(accelerator))
    return accelerator


def cores(accelerator: Accelerator) -> int:
    """Cores that this process may call its own."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def resolve_precision(precision: Precision) -> Literal["fp32", "bf16"]:
    """bf16 where it is faster: on GPUs that have it and on CPUs with matrix instructions for it."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = [getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile")]
    return "bf16" if any(has) else "fp32"


def device_name(device: torch.device) -> str:
    """What a number was measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check_compiler(device: torch.device) -> None:
    """Raise a ValueError if torch.compile does not work on this machine."""
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.ones(4, device=device))
    except Exception as error:  # whatever the toolchain says, it means the same to the user
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"--compile does not work here: {reason}") from None


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest product of square matrices, up to 8192 wide or a tenth of a second."""
    best, side, seconds = 0.0, 512, 0.0
    while side <= 8192 and seconds < 0.1:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = min(_seconds(a, b, device) for _ in range(5))
        best = max(best, 2 * side**3 / seconds)
        side *= 2
    return best


def wait(device: torch.device) -> None:
    """Until all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(a: Tensor, b: Tensor, device: torch.device) -> float:
    began = time.perf_counter()
    F.linear(a, b)
    wait(device)
    return time.perf_counter() - began
