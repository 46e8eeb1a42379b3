"""Part 4: training step of ViT-B with every attention kernel, eager and compiled, compared with VideoMAE."""

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._dynamo.utils import counters

from data.text import one_line
from pipelines.benchmarks import Row, comparison
from pipelines.benchmarks.entrants import Entrant, Shape, ours, videomae
from pipelines.benchmarks.pretrain_speed import flop_of
from pipelines.engine.device import matrix_peak, wait
from pipelines.gpu.part import Setting, attempt, run

TARGETS = 0.25
STEPS, SECONDS = 60, 6.0
"""Most timed steps of a variant, and most seconds for them."""
RESERVED = {False: 15.0, True: 50.0}
"""Seconds that a variant needs, eager and compiled; no variant starts with less."""
COMPARED = 20
"""First steps whose losses are compared."""
SMALL = Shape(frames=4, side=32, width=48, depth=1, heads=2, batch=2, clusters=(1, 1, 1))
"""Shape of a dry run."""
DRY_STEPS = 3
VARIANTS = [
    ("VideoMAE", "sdpa", False),
    ("ARVideo", "sdpa", False),
    ("ARVideo", "xformers", False),
    ("ARVideo", "xformers", True),
    ("ARVideo", "sdpa", True),
    ("VideoMAE", "sdpa", True),
    ("ARVideo", "plain", False),
    ("ARVideo", "flex", True),
    ("ARVideo", "flex", False),
    ("ARVideo", "plain", True),
]
"""Model, attention kernel, compiled or not; most informative first. flex is compiled by itself in all cases."""
DRY_VARIANTS = [VARIANTS[0], VARIANTS[1], VARIANTS[2], VARIANTS[4]]


@dataclass
class Timing:
    """Measurement of one variant: the median time of a step, its peak memory in bytes, and the first losses."""

    seconds: float
    memory: float
    losses: list[float]


def measure(setting: Setting) -> Iterator[Row]:
    """Yield clips/s, memory, share of the matmul peak, compiler statistics and differences of losses."""
    device, shape = setting.device, SMALL if setting.dry else Shape(batch=32)
    steps = DRY_STEPS if setting.dry else STEPS
    peak = matrix_peak(device, torch.bfloat16)
    yield Row("peak bf16 matmul throughput", "TFLOP/s", peak / 1e12)
    # A trace of one clip: plain attention splits larger batches into hundreds of tiles, whose trace takes minutes.
    clip = replace(shape, batch=1)
    flop = {
        "ARVideo": shape.batch * flop_of(partial(ours, clip, targets=TARGETS), "plain"),
        "VideoMAE": shape.batch * flop_of(partial(videomae, clip), "eager"),
    }
    builders = {"ARVideo": partial(ours, shape, device, targets=TARGETS), "VideoMAE": partial(videomae, shape, device)}
    fastest: dict[str, Timing] = {}
    first: tuple[str, Timing] | None = None
    for model, attention, compiled in DRY_VARIANTS if setting.dry else VARIANTS:
        name = f"{model}, {attention}{', compiled' if compiled else ''}"
        if setting.left() < RESERVED[compiled]:
            yield Row(name, "", "not measured: no time left")
            continue
        timings: list[Timing] = []
        build = partial(builders[model], attention=attention, compiled=compiled)
        yield from attempt(name, partial(_variant, name, build, shape, steps, timings))
        for timing in timings:
            yield Row(f"{name}: share of the matmul peak", "", flop[model] / timing.seconds / peak, reach="≥ 0.4")
            if model == "ARVideo":
                first = first or (name, timing)
                yield _difference(name, timing, *first)
            if model not in fastest or timing.seconds < fastest[model].seconds:
                fastest[model] = timing
                # After every improvement, because the part may be stopped during any later variant.
                yield from _comparison(shape, fastest)


def _variant(name: str, build: partial[Entrant], shape: Shape, steps: int, timings: list[Timing]) -> Iterator[Row]:
    """Time one variant, append the result to `timings`, and yield its rows."""
    torch._dynamo.reset()
    counters.clear()
    entrant = build()
    try:
        began = time.perf_counter()
        losses: list[torch.Tensor] = []
        while len(losses) < min(COMPARED, steps) and (len(losses) < 3 or time.perf_counter() - began < SECONDS):
            losses.append(entrant.step())
            wait(entrant.device)
        first_steps = time.perf_counter() - began
        laps: list[float] = []
        while len(laps) < steps and sum(laps) < SECONDS:
            laps.append(entrant.seconds())
        timing = Timing(statistics.median(laps), entrant.memory(), torch.stack(losses).tolist())
    finally:
        del entrant
        # Compiled models are in reference cycles.
        gc.collect()
    timings.append(timing)
    yield Row(f"{name}: training", "clips/s", shape.batch / timing.seconds)
    yield Row(f"{name}: memory beyond weights and optimizer", "MiB", timing.memory / 2**20)
    if graphs := counters["stats"].get("unique_graphs", 0):
        breaks = sum(counters["graph_break"].values())
        yield Row(
            f"{name}: first {len(losses)} steps, {graphs} compiled graphs, {breaks} graph breaks", "s", first_steps
        )
        for reason, count in counters["graph_break"].most_common(3):
            yield Row(f"{name}: graph break", "", f"{count} times: {one_line(reason, 300)}")


def _difference(name: str, timing: Timing, first_name: str, first: Timing) -> Row:
    """Return the row with the largest difference of the losses of two variants, in the steps that both have."""
    steps = min(len(timing.losses), len(first.losses))
    differences = torch.tensor(timing.losses[:steps]) - torch.tensor(first.losses[:steps])
    # A NaN stays a NaN in this maximum.
    return Row(
        f"{name}: largest difference of {steps} losses to those of {first_name}", "nats", differences.abs().max().item()
    )


def _comparison(shape: Shape, fastest: dict[str, Timing]) -> Iterator[Row]:
    """Yield the speed and the memory of the fastest variants so far, if both models have one."""
    if len(fastest) < 2:
        return
    arvideo, peer = fastest["ARVideo"], fastest["VideoMAE"]
    what = f"ViT-B, bf16, batch {shape.batch}, targets {TARGETS}, fastest of each so far"
    speeds = shape.batch / arvideo.seconds, shape.batch / peer.seconds
    yield comparison(f"{what}: training", "clips/s", *speeds, "VideoMAE", "≥ 2.5")
    memory = arvideo.memory / 2**20, peer.memory / 2**20
    yield comparison(f"{what}: memory beyond weights and optimizer", "MiB", *memory, "VideoMAE", "≤ 0.4")


if __name__ == "__main__":
    run(measure)
