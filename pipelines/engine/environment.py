"""Facts about this machine: what can run here, why something cannot, and what would change that.

Each check imports what it needs by itself, so that a missing or broken package costs one line of the report.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *(
        "torch",
        "accelerate",
        "webdataset",
        "av",
        "vector-quantize-pytorch",
        "safetensors",
        "jsonargparse",
        "scikit-learn",
    ),
    *("torchmetrics", "triton", "transformers"),
)
"""Packages whose versions are reported. The last two are optional."""
OPTIONAL = {
    "triton": "needed on GPUs only, where PyTorch's CUDA build brings it",
    "transformers": "needed only to compare with its VideoMAE",
}
MIN_SHARED_MEMORY = 2**30
"""Bytes of /dev/shm below which loader processes may have to send pixels through a slow pipe."""
MIN_DISK = 10 * 2**30


@dataclass(frozen=True)
class Check:
    """One fact.

    Attributes:
        name: The thing that was checked.
        state: Its version or state, or the reason why it does not work.
        fix: The change or command that would make it work; empty if there is nothing to fix.
    """

    name: str
    state: str
    fix: str = ""


def checks() -> Iterator[Check]:
    """Yield all facts. A check that fails is reported with the reason."""
    yield Check("Python", f"{platform.python_version()}, {sys.executable}", _python_fix())
    yield Check("system", f"{platform.system()} {platform.machine()}, {_cores()} usable cores")
    yield from (_package(name) for name in PACKAGES)
    for name, check in _CHECKS.items():
        try:
            yield from check()
        # A half-broken package can raise any type of error.
        except Exception as error:
            yield Check(name, f"check failed: {type(error).__name__}: {_line(error)}", "reinstall with `make setup`")


def _python_fix() -> str:
    return "" if sys.version_info >= (3, 10) else "install Python 3.10 or newer"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _package(name: str) -> Check:
    try:
        return Check(name, version(name))
    except PackageNotFoundError:
        if name in OPTIONAL:
            return Check(name, f"not installed; {OPTIONAL[name]}")
        return Check(name, "not installed", "run `make setup`")


def _devices() -> Iterator[Check]:
    import torch

    built_for = torch.version.cuda
    if not torch.cuda.is_available():
        fix = (
            "" if not Path("/proc/driver/nvidia").exists() else "install PyTorch's CUDA build, or a newer NVIDIA driver"
        )
        yield Check("CUDA", f"no device; PyTorch is built for {f'CUDA {built_for}' if built_for else 'CPUs only'}", fix)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Check(f"GPU {index}", f"{properties.name}, {memory}, {capability}; PyTorch is built for CUDA {built_for}")


def _precision() -> Iterator[Check]:
    from pipelines.engine.device import resolve_precision

    chosen = resolve_precision("auto")
    reason = "native bf16 instructions" if chosen == "bf16" else "no native bf16 instructions"
    yield Check("precision auto", f"{chosen} ({reason})")


def _kernels() -> Iterator[Check]:
    """Run every attention kernel once, forward and backward, with and without a mask."""
    import torch

    from ar_model.attention_mask import BlockMask
    from ar_model.attention_trial import reason
    from ar_model.backends import BACKENDS

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    for name, kernel in BACKENDS.items():
        what = f"attention {name}"
        try:
            for mask in (None, BlockMask(4, 16, 16)):
                q, k, v = (torch.randn(1, 2, 64, 32, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
                out = kernel(q, k, v, mask)
                out.backward(torch.ones_like(out))
            yield Check(what, f"runs on {device.type}")
        # Third-party kernels raise many types of errors.
        except Exception as error:
            yield Check(what, f"does not run: {reason(error)}", _kernel_fix(name, cuda))


def _kernel_fix(name: str, cuda: bool) -> str:
    if not cuda:
        return ""
    if name == "xformers":
        return "pip install 'arvideo[xformers]'; docs/gpu.md lists the pairs of versions that were tried"
    return ""


def _compiler() -> Iterator[Check]:
    import torch

    from pipelines.engine.device import check_compiler

    try:
        check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        yield Check("torch.compile", "works")
    except ValueError as error:
        yield Check("torch.compile", _line(error), "install a C++ compiler (g++), or leave out --compile")


def _decoders() -> Iterator[Check]:
    import av

    names = [name for name in ("h264", "hevc", "vp9", "av1", "mpeg4") if name in av.codecs_available]
    yield Check("video decoders", f"{', '.join(names)} (PyAV {av.__version__})")


def _memory() -> Iterator[Check]:
    import psutil

    from data.text import size

    memory = psutil.virtual_memory()
    yield Check("memory", f"{size(memory.total)}, {size(memory.available)} free")
    shared = Path("/dev/shm")
    if shared.exists():
        free = shutil.disk_usage(shared).free
        fix = "" if free >= MIN_SHARED_MEMORY else "enlarge it (docker run --shm-size=8g), or use --workers 0"
        yield Check("/dev/shm", f"{size(free)} free", fix)
    free = shutil.disk_usage(".").free
    fix = "" if free >= MIN_DISK else "free some space; caches and runs are written here"
    yield Check("disk of this folder", f"{size(free)} free", fix)


def _line(error: Exception) -> str:
    # Not data.text.one_line: the package data needs packages that may be missing.
    return " ".join(str(error).split())[:500]


_CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "CUDA": _devices,
    "precision auto": _precision,
    "attention": _kernels,
    "torch.compile": _compiler,
    "video decoders": _decoders,
    "memory": _memory,
}
