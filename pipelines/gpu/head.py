"""Part 6: time and memory of the cross-entropy at 64,000 codes, by the size of its chunks."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ar_model.cross_entropy import linear_cross_entropy
from pipelines.benchmarks import Row
from pipelines.engine.device import wait
from pipelines.engine.memory import peak_of
from pipelines.gpu.part import Setting, attempt, run

_CODES, _WIDTH = 64_000, 512
_EXPONENTS = (22, 24, 26, 28, 30)
"""Chunks of 2 ** exponent logits."""


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the time and the memory of a forward and backward pass, for the predictions of a batch of 32 clips."""
    predictions, codes, exponents = (64, 1000, (12, 14)) if setting.dry else (32 * 1470, _CODES, _EXPONENTS)
    device, generator = setting.device, torch.Generator().manual_seed(0)
    with device:
        h_ND = torch.randn(predictions, _WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight_VD = torch.nn.Parameter(0.02 * torch.randn(codes, _WIDTH))
        bias_V = torch.nn.Parameter(torch.zeros(codes))
    target_N = torch.randint(codes, (predictions,), generator=generator).to(device)

    def step(chunk: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = linear_cross_entropy(h_ND, weight_VD, bias_V, target_N, max_logits=chunk)
        loss.backward()
        h_ND.grad = weight_VD.grad = bias_V.grad = None
        return loss.detach()

    for exponent in exponents:
        what = f"cross-entropy of {predictions:,} predictions of {codes:,} codes, chunks of 2^{exponent} logits"
        yield from attempt(what, partial(_rows, what, 2**exponent, step, device))


def _rows(what: str, chunk: int, step: Callable[[int], Tensor], device: torch.device) -> Iterator[Row]:
    loss = step(chunk).item()
    wait(device)
    began, laps = time.perf_counter(), 3
    for _ in range(laps):
        step(chunk)
    wait(device)
    yield Row(f"{what} (loss {loss:.4f})", "ms", 1000 * (time.perf_counter() - began) / laps)
    yield Row(f"{what}, peak memory", "MiB", peak_of(lambda: step(chunk), device) / 2**20)


if __name__ == "__main__":
    run(measure)
