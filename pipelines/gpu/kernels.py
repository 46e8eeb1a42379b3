"""Part 3: times of the attention kernels on the shapes of ViT-B, forward and backward, bf16."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from ar_model.attention_mask import BlockMask, Mask
from ar_model.attention_trial import Call, time_backends
from pipelines.benchmarks import Row
from pipelines.gpu.part import Setting, attempt, run

WIDTH = 64
"""Channels of a head."""
SHAPES: dict[str, tuple[int, int, int, Mask]] = {
    "encoder of ARVideo, 300 x 300": (12, 300, 300, BlockMask(15, 20, 20)),
    "decoder, targets 1.0, 1,470 x 300": (8, 1470, 300, BlockMask(15, 98, 20)),
    "decoder, targets 0.25, 375 x 300": (8, 375, 300, BlockMask(15, 25, 20)),
    "clusters of one token, 1,567 x 1,567": (12, 1567, 1567, BlockMask(1567, 1, 1)),
    "VideoMAE, no mask, 1,568 x 1,568": (12, 1568, 1568, None),
}
"""Heads, queries, keys and mask by name: 16 frames of 224x224 in 2x16x16 tokens, clusters of 2x7x7 tokens, keep 0.2."""


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the time of each kernel on each shape, or the reason why it does not run."""
    batch, laps = (1, 1) if setting.dry else (32, 8)
    # An error of flex may leave CUDA unusable for this process: it comes last.
    for names, (shape, (heads, queries, keys, mask)) in product(
        (["sdpa", "xformers", "plain"], ["flex"]), SHAPES.items()
    ):
        call = Call(
            torch.Size((batch, heads, queries, WIDTH)), torch.Size((batch, heads, keys, WIDTH)), torch.bfloat16, mask
        )
        yield from attempt(shape, partial(_rows, shape, call, names, setting.device, laps))


def _rows(shape: str, call: Call, names: list[str], device: torch.device, laps: int) -> Iterator[Row]:
    trial = time_backends(Counter([call]), device, names, laps)
    for name, seconds in trial.seconds.items():
        yield Row(f"{shape}, batch {call.queries[0]}: {name}", "ms", 1000 * seconds)
    for name, failure in trial.failures.items():
        yield Row(f"{shape}, batch {call.queries[0]}: {name}", "", f"does not run: {failure}")


if __name__ == "__main__":
    run(measure)
