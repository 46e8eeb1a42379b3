"""Training steps of this project compared with VideoMAE of transformers: throughput, peak memory, FLOPs, and data loading."""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ar_model.costs import cost_of
from ar_model.objectives import VideoMAE
from data.cache import TokenCache
from data.clip_spec import ClipSpec
from data.loading import Batch, BatchPlan, ClipDataset, TokenDataset, batches
from data.sources import Source
from pipelines.benchmarks import Row, comparison, in_new_process
from pipelines.benchmarks.entrants import Entrant, Shape, fastest, memory_of, ours, tube_mask, videomae
from pipelines.benchmarks.synthetic import synthetic_cache
from pipelines.engine.attention_choice import CANDIDATES
from pipelines.engine.device import matrix_peak, wait

PEER = "VideoMAE"


@dataclass(frozen=True)
class Setting:
    """Settings of a model of this project, and targets for its comparison with VideoMAE of transformers.

    Attributes:
        settings: keyword arguments of `ours`.
        reach: target ratios of the throughput of a step ("cpu" or "cuda"), of training from disk ("disk"), and of the
            peak memory ("memory").
        from_disk: also measure training from disk.
    """

    settings: Mapping[str, Any]
    reach: Mapping[str, str] = field(default_factory=dict)
    from_disk: bool = False


SETTINGS = {
    "targets 0.25": Setting(
        {"targets": 0.25}, {"cpu": "≥ 3.0", "cuda": "≥ 2.5", "disk": "≥ 3.0", "memory": "≤ 0.4"}, from_disk=True
    ),
    "targets 1.0": Setting({"targets": 1.0}, {"cpu": "≥ 1.5", "cuda": "≥ 1.3"}, from_disk=True),
    "targets 0.25, ranks 0.5": Setting({"targets": 0.25, "ranks": 0.5}),
    "targets 1.0, ranks 0.5": Setting({"targets": 1.0, "ranks": 0.5}),
    "VideoMAE of arvideo": Setting({"objective": VideoMAE}, {"cpu": "≥ 1.5", "cuda": "≥ 1.5", "memory": "≤ 0.7"}),
}
"""ARVideo with settings cheaper than its paper's (targets 1.0, ranks 1.0), and VideoMAE as implemented in this project."""
SHARE = {"cpu": "≥ 0.5", "cuda": "≥ 0.4"}
"""Target fraction of peak matmul throughput, by device."""
STEPS_FROM_DISK = 6
"""Timed steps of training from disk."""
LARGEST = 6
"""Number of operations that the profile lists."""


def measure(
    folder: Path, source: Source, device: torch.device, scale: float, shape: Shape | None = None
) -> Iterator[Row]:
    """Choose the fastest setting of each model, alternate the steps of two models, and compare their median times."""
    shape = shape or Shape(batch=8 if device.type == "cpu" else 64)
    rounds = max(2, round(6 * scale))
    device_kind = "cuda" if device.type == "cuda" else "cpu"
    peak = matrix_peak(device, torch.bfloat16)
    yield Row("peak bf16 matmul throughput", "TFLOP/s", peak / 1e12)
    build_peer, timings = fastest(partial(videomae, shape, device), _variants(["sdpa", "eager"]))
    _log(timings)
    peer, peer_memory = build_peer(), in_new_process(memory_of, build_peer)
    peer_flop = flop_of(partial(videomae, shape), "eager")
    title = f"ViT of width {shape.width}, {shape.frames} frames of {shape.side}x{shape.side}, bf16, batch {shape.batch}"
    for name, setting in SETTINGS.items():
        build, timings = fastest(partial(ours, shape, device, **setting.settings), _variants(CANDIDATES[device.type]))
        _log(timings)
        entrant = build()
        our_s, peer_s = by_turns([entrant.seconds, peer.seconds], rounds)
        what, target = f"{title}: {name} ({entrant.name})", setting.reach.get(device_kind, "")
        yield comparison(what, "clips/s", shape.batch / our_s, shape.batch / peer_s, peer.name, target)
        flop = flop_of(partial(ours, shape, **setting.settings), "plain")
        yield comparison(f"FLOP per step, {name}", "TFLOP", flop / 1e12, peer_flop / 1e12, PEER)
        what = f"fraction of peak matmul throughput, {name}"
        yield comparison(what, "", flop / our_s / peak, peer_flop / peer_s / peak, PEER, SHARE[device_kind])
        what = f"peak memory of a step excluding weights and optimizer state, {name}"
        memory, target = in_new_process(memory_of, build), setting.reach.get("memory", "")
        yield comparison(what, "MiB", memory / 2**20, peer_memory / 2**20, peer.name, target)
        if setting.from_disk:
            what = f"training from disk, {name}; {PEER} reads {source.name}"
            steps = max(2, round(STEPS_FROM_DISK * scale))
            our_s, peer_s, workers = from_disk(folder / name, source, shape, entrant, peer, steps, _worker_counts())
            alternative, target = f"{PEER}, {workers} workers", setting.reach.get("disk", "")
            yield comparison(what, "clips/s", shape.batch / our_s, shape.batch / peer_s, alternative, target)
        yield from _profile(entrant, name)
        # Free the model before the next one is built.
        del entrant


def flop_of(build: partial[Entrant], attention: str) -> float:
    """Count the FLOPs of the matrix products and the attention of a step in a trace on a CPU."""
    # Cache the mask now, because a mask created during the trace would be a FakeTensor.
    tube_mask(build.args[0])

    def traced() -> tuple[torch.nn.Module, Callable[[], object]]:
        entrant = build(device=torch.device("cpu"), attention=attention, compiled=False)
        return entrant.model, entrant.step

    return float(cost_of(traced).flop)


def by_turns(timers: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """Call the timers in turn and return the median of each. The first round is a warm-up and is discarded."""
    laps = [[timer() for timer in timers] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*laps, strict=True)]


def _profile(entrant: Entrant, name: str) -> Iterator[Row]:
    """Yield the operations with the largest shares of a step's time, excluding callees. Compiled graphs are added up."""
    cuda = entrant.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        entrant.step()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    microseconds: Counter[str] = Counter()
    for event in trace.key_averages():
        operation = "compiled code" if "CompiledFxGraph" in event.key else event.key
        microseconds[operation] += getattr(event, key)
    for operation, time_us in microseconds.most_common(LARGEST):
        what = f"share of the time of a step, {name} ({entrant.name}): {operation}"
        yield Row(what, "", time_us / microseconds.total())


def _variants(attentions: Sequence[str]) -> list[dict[str, Any]]:
    """List the settings to try: each attention kernel, compiled and not."""
    return [{"attention": name, "compiled": compiled} for compiled in (False, True) for name in attentions]


def _log(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def from_disk(
    folder: Path,
    source: Source,
    shape: Shape,
    entrant: Entrant,
    peer: Entrant,
    steps: int,
    worker_counts: Sequence[int],
) -> tuple[float, float, int]:
    """Time a step with data loading: ARVideo reads codes from a cache, VideoMAE decodes and crops videos.

    `worker_counts` lists the numbers of decoding workers to try for VideoMAE.

    Returns:
        Seconds per step of ARVideo and of VideoMAE with its fastest number of workers, and that number.
    """
    clip = ClipSpec(frames=shape.frames, size=shape.side, stride=4, views=1)
    cache = TokenCache.open(synthetic_cache(folder, source.videos, views=1, codes_shape=shape.grid, clip=clip))
    plan = BatchPlan(samples=len(source.videos), batch_size=shape.batch, seed=0)
    codes = TokenDataset(cache, range(len(cache)), plan)
    videos = ClipDataset(source, range(len(source.videos)), clip, plan, memory=0)

    def to_peer(batch: Batch) -> dict[str, torch.Tensor]:
        pixels_BTHWC = batch["pixels_BTHWC"].to(peer.device)
        return {
            # Approximate mean and standard deviation of natural images.
            "pixel_values": ((pixels_BTHWC / 255 - 0.45) / 0.225).permute(0, 1, 4, 2, 3).contiguous(),
            "bool_masked_pos": tube_mask(shape).to(peer.device),
        }

    def to_ours(batch: Batch) -> dict[str, torch.Tensor]:
        return {key: batch[key].to(entrant.device) for key in ("codes_BTHW", "seed_B")}

    our_s = _seconds(entrant, codes, to_ours, 0, steps)
    peer_s, workers = min((_seconds(peer, videos, to_peer, count, steps), count) for count in worker_counts)
    return our_s, peer_s, workers


def _seconds(
    entrant: Entrant, dataset: Any, prepare: Callable[[Batch], dict[str, torch.Tensor]], workers: int, steps: int
) -> float:
    """Return the seconds per step, including data loading. Batches that workers may have prefetched are not timed."""
    ahead = 1 + 2 * workers
    stream = batches(dataset, range(ahead + steps), workers)
    for _ in range(ahead):
        entrant.step(prepare(next(stream)))
    wait(entrant.device)
    began = time.perf_counter()
    for batch in stream:
        entrant.step(prepare(batch))
    wait(entrant.device)
    return (time.perf_counter() - began) / steps


def _worker_counts() -> list[int]:
    """List the numbers of decoding workers to try for VideoMAE: 0 and powers of two up to the number of cores."""
    cores = os.cpu_count() or 1
    return [0] + [2**i for i in range(cores.bit_length())]
