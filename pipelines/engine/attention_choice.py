"""What computes: the attention kernel for this run, whether there is a compiler, how fast matrix products are."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from ar_model.attention import set_backend
from ar_model.attention_trial import Trial, try_backends
from ar_model.objectives import Objective
from pipelines.engine.console import boxed, say

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
