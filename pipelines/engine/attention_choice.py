"""Choice of the attention kernel of a run, by measurement."""

import textwrap
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ar_model.attention import set_backend
from ar_model.attention_trial import Trial, try_backends
from pipelines.engine.console import boxed, say

CANDIDATES = defaultdict(lambda: ["plain", "sdpa"], cuda=["xformers", "flex", "sdpa", "plain"])
"""Kernels that a trial compares, by device type."""


def choose_attention(accelerator: Accelerator, network: nn.Module, batch: dict[str, Tensor], requested: str) -> str:
    """Return the requested attention kernel; for `auto`, the kernel with the fastest forward and backward pass on a batch.

    Prints the measured times in one line, and a warning in a box if another kernel is faster or may be faster.

    Raises:
        ValueError: if the requested kernel does not run on this machine.
    """
    candidates = CANDIDATES[accelerator.device.type]
    if requested not in ("auto", *candidates):
        candidates = [requested, *candidates]
    # try_backends runs the network once to record the attention calls; `plain` runs on every device.
    set_backend(network, "plain")
    with accelerator.autocast():
        trial = try_backends(network, lambda: network(batch), candidates)
    if requested in trial.failures:
        raise ValueError(f"--attention {requested} does not run here: {trial.failures[requested]}")
    chosen = trial.fastest if requested == "auto" else requested
    times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in trial.seconds.items())
    say(accelerator, f"attention kernel {chosen}; forward and backward time of all attention layers in a step: {times}")
    if warning := _warning(trial, chosen, accelerator.device):
        say(accelerator, boxed(warning))
    return chosen


def _warning(trial: Trial, chosen: str, device: torch.device) -> str | None:
    """Return a warning if a faster kernel exists or may exist."""
    kernel, ratio = f"attention kernel {chosen}", trial.seconds[chosen] / trial.seconds[trial.fastest]
    # Differences of up to 10 % are noise of the measurement.
    if ratio > 1.1:
        return f"{kernel} takes {ratio:.1f} times as long as {trial.fastest} on this machine; run without --attention"
    if device.type == "cuda" and "xformers" in trial.failures:
        reason = textwrap.shorten(trial.failures["xformers"], 600)
        return f"{kernel}: the fused kernel of xformers, often the fastest, does not run here ({reason})"
    return None
