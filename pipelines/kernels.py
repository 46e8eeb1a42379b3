"""What computes: the attention kernel for this run, whether there is a compiler, how fast matrix products are."""

import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ar_model.attention import Trial, set_backend, try_backends
from ar_model.objectives import Objective
from pipelines.run import boxed, say

CANDIDATES = defaultdict(lambda: ["plain", "sdpa"], cuda=["xformers", "flex", "sdpa", "plain"])
"""Kernels that a trial compares, by device."""


def choose_attention(accelerator: Accelerator, objective: Objective, batch: dict[str, Tensor], wanted: str) -> str:
    """The wanted attention kernel, or for `auto` the fastest, forward and backward, on the shapes that a batch gives.

    What was measured is said in one line; a box says so where a slower kernel than the best is used.

    Raises:
        ValueError: if the wanted one does not run here.
    """
    candidates = CANDIDATES[accelerator.device.type]
    if wanted not in ("auto", *candidates):
        candidates = [wanted, *candidates]
    set_backend(objective, "plain")  # runs everywhere
    with accelerator.autocast():
        trial = try_backends(objective, lambda: objective(batch), candidates)
    if wanted in trial.failures:
        raise ValueError(f"--attention {wanted} does not run here: {trial.failures[wanted]}")
    chosen = trial.fastest if wanted == "auto" else wanted
    times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in trial.seconds.items())
    say(accelerator, f"attention {chosen}; all attention of a step, forward and backward: {times}")
    slow = _slower(trial, chosen, accelerator.device)
    if slow:
        say(accelerator, boxed(slow))
    return chosen


def _slower(trial: Trial, chosen: str, device: torch.device) -> str | None:
    """What to say of a kernel that is not the best there is."""
    ratio = trial.seconds[chosen] / trial.seconds[trial.fastest]
    if ratio > 1.1:
        return f"attention {chosen} takes {ratio:.1f} times as long here as {trial.fastest}: leave out --attention"
    if device.type == "cuda" and "xformers" in trial.failures:
        reason = trial.failures["xformers"]
        return f"attention {chosen}: xformers' fused kernel, often the fastest, does not run here ({reason})"
    return None


def refuse_without_compiler(device: torch.device) -> None:
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
