"""A training step of ours beside one of VideoMAE's: clips per second, memory, arithmetic, and both fed from disk."""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ar_model.costs import cost_of
from ar_model.objectives import VideoMAE
from data.cache import TokenCache
from data.clips import ClipSpec
from data.loading import Batch, BatchPlan, ClipDataset, TokenDataset, batches
from data.sources import Source
from pipelines.benchmarks import Row
from pipelines.benchmarks.entrants import Entrant, Shape, fastest, memory_alone, ours, tube_mask, videomae
from pipelines.benchmarks.synthetic import synthetic_cache
from pipelines.engine.attention_choice import CANDIDATES
from pipelines.engine.device import matrix_peak, wait

PEER = "VideoMAE"


@dataclass(frozen=True)
class Setting:
    """
    What of ours is measured beside the peer, and what we want of it.

    Attributes:
        settings: Of the entrant.
        reach: Ratios of clips per second: on a "cpu", on "cuda", and with both fed from "disk".
        memory: Ratio of memory; None for no wish.
        from_disk: Whether both are fed from disk too.
    """

    settings: Mapping[str, Any]
    reach: Mapping[str, float] = field(default_factory=dict)
    memory: float | None = None
    from_disk: bool = False


SETTINGS = {
    "targets 0.25": Setting({"targets": 0.25}, {"cpu": 3.0, "cuda": 2.5, "disk": 3.0}, memory=0.4, from_disk=True),
    "targets 1.0": Setting({"targets": 1.0}, {"cpu": 1.5, "cuda": 1.3}, from_disk=True),
    "targets 0.25, ranks 0.5": Setting({"targets": 0.25, "ranks": 0.5}),
    "targets 1.0, ranks 0.5": Setting({"targets": 1.0, "ranks": 0.5}),
    "our VideoMAE": Setting({"objective": VideoMAE}, {"cpu": 1.5, "cuda": 1.5}, memory=0.7),
}
"""ARVideo, which the paper trains on all targets and ranks, and the peer's own objective."""
SHARE = {"cpu": 0.5, "cuda": 0.4}
"""Of the matrix-product peak, that we want."""
STEPS_FROM_DISK = 6
LARGEST = 6
"""Operations of the profile."""


def measure(
    folder: Path, source: Source, device: torch.device, scale: float, shape: Shape | None = None
) -> Iterator[Row]:
    """Each side in the fastest of its settings; then they take turns, a step each, and medians are compared."""
    shape = shape or Shape(batch=8 if device.type == "cpu" else 64)
    rounds = max(2, round(6 * scale))
    kind = "cuda" if device.type == "cuda" else "cpu"
    peak = matrix_peak(device, torch.bfloat16)
    yield Row(what="the fastest product of bf16 matrices", unit="TFLOP/s", ours=peak / 1e12)
    build_peer, tried = fastest(partial(videomae, shape, device), _both(["sdpa", "eager"]))
    _tell(tried)
    peer, peer_memory = build_peer(), memory_alone(build_peer)
    peer_flop = flop_of(partial(videomae, shape), "eager")
    title = f"ViT of width {shape.width}, {shape.frames} frames of {shape.side}x{shape.side}, bf16, batch {shape.batch}"
    for name, setting in SETTINGS.items():
        build, tried = fastest(partial(ours, shape, device, **setting.settings), _both(CANDIDATES[device.type]))
        _tell(tried)
        mine = build()
        mine_s, peer_s = by_turns([mine.seconds, peer.seconds], rounds)
        yield Row(
            what=f"{title}: {name} ({mine.name})",
            unit="clips/s",
            ours=shape.batch / mine_s,
            peer=shape.batch / peer_s,
            alternative=peer.name,
            ratio=peer_s / mine_s,
            reach=_wished("≥", setting.reach.get(kind)),
        )
        flop = flop_of(partial(ours, shape, **setting.settings), "plain")
        yield Row(
            what=f"arithmetic of a step, {name}",
            unit="TFLOP",
            ours=flop / 1e12,
            peer=peer_flop / 1e12,
            alternative=PEER,
            ratio=flop / peer_flop,
        )
        shares = flop / mine_s / peak, peer_flop / peer_s / peak
        yield Row(
            what=f"share of the matrix-product peak, {name}",
            unit="",
            ours=shares[0],
            peer=shares[1],
            alternative=PEER,
            ratio=shares[0] / shares[1],
            reach=_wished("≥", SHARE[kind]),
        )
        memory = memory_alone(build)
        yield Row(
            what=f"peak memory of a step beyond weights and optimizer, {name}",
            unit="MiB",
            ours=memory / 2**20,
            peer=peer_memory / 2**20,
            alternative=peer.name,
            ratio=memory / peer_memory,
            reach=_wished("≤", setting.memory),
        )
        if setting.from_disk:
            row = _from_disk(folder, source, shape, mine, peer, max(2, round(STEPS_FROM_DISK * scale)), name)
            yield replace(row, reach=_wished("≥", setting.reach.get("disk")))
        yield from _profile(mine, name)
        del mine


def _wished(sign: str, ratio: float | None) -> str:
    return "" if ratio is None else f"{sign} {ratio}"


def flop_of(build: partial[Entrant], attention: str) -> float:
    """Operations of a step, of matrix products and attention, by its trace on a CPU."""
    tube_mask(build.args[0])

    def traced() -> tuple[torch.nn.Module, Callable[[], object]]:
        entrant = build(device=torch.device("cpu"), attention=attention, compiled=False)
        return entrant.model, entrant.step

    return float(cost_of(traced).flop)


def by_turns(ways: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """The median of what each way returns, called in turns, after a round that does not count."""
    laps = [[way() for way in ways] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*laps, strict=True)]


def _profile(entrant: Entrant, name: str) -> Iterator[Row]:
    """Where the time of a step goes: the operations that take the most, without what they call; compiled code is one."""
    cuda = entrant.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        entrant.step()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    taken: Counter[str] = Counter()
    for event in trace.key_averages():
        taken["compiled code" if "CompiledFxGraph" in event.key else event.key] += getattr(event, key)
    for operation, microseconds in taken.most_common(LARGEST):
        yield Row(
            what=f"share of the time of a step, {name} ({entrant.name}): {operation}",
            unit="",
            ours=microseconds / taken.total(),
        )


def _both(attentions: Sequence[str]) -> list[dict[str, Any]]:
    return [{"attention": name, "compiled": compiled} for compiled in (False, True) for name in attentions]


def _tell(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def _from_disk(folder: Path, source: Source, shape: Shape, mine: Entrant, peer: Entrant, steps: int, name: str) -> Row:
    """Both train from what they read: ours codes from its cache, VideoMAE clips that it decodes and cuts."""
    clip = ClipSpec(frames=shape.frames, size=shape.side, stride=4, views=1)
    cache = TokenCache.open(
        synthetic_cache(folder / name, source.videos, views=1, codes_shape=shape.grid, vocab_size=1000, clip=clip)
    )
    plan = BatchPlan(samples=len(source.videos), batch_size=shape.batch, seed=0)
    codes = TokenDataset(cache, range(len(cache)), plan)
    videos = ClipDataset(source, range(len(source.videos)), clip, plan, memory=0)
    mask = tube_mask(shape)

    def to_peer(batch: Batch) -> dict[str, torch.Tensor]:
        pixels_BTHWC = batch["pixels_BTHWC"].to(peer.device)
        return {
            "pixel_values": ((pixels_BTHWC / 255 - 0.45) / 0.225).permute(0, 1, 4, 2, 3).contiguous(),
            "bool_masked_pos": mask.to(peer.device),
        }

    def to_ours(batch: Batch) -> dict[str, torch.Tensor]:
        return {key: batch[key].to(mine.device) for key in ("codes_BTHW", "seed_B")}

    mine_s = _seconds(mine, codes, to_ours, 0, steps)
    workers = _workers()
    peer_s = [_seconds(peer, videos, to_peer, count, steps) for count in workers]
    return Row(
        what=f"from disk, {name}; {PEER} reads {source.name}",
        unit="clips/s",
        ours=shape.batch / mine_s,
        peer=shape.batch / min(peer_s),
        alternative=f"{PEER}, {workers[peer_s.index(min(peer_s))]} workers",
        ratio=min(peer_s) / mine_s,
    )


def _seconds(
    entrant: Entrant, dataset: Any, to: Callable[[Batch], dict[str, torch.Tensor]], workers: int, steps: int
) -> float:
    """Of a step, with its batch read from disk. Those that workers had read before the first step do not count."""
    ahead = 1 + 2 * workers
    stream = batches(dataset, range(ahead + steps), workers)
    for _ in range(ahead):
        entrant.step(to(next(stream)))
    wait(entrant.device)
    began = time.perf_counter()
    for batch in stream:
        entrant.step(to(batch))
    wait(entrant.device)
    return (time.perf_counter() - began) / steps


def _workers() -> list[int]:
    """Numbers of processes that decode for VideoMAE, up to as many as there are cores; the best counts."""
    cores = os.cpu_count() or 1
    return [0] + [2**i for i in range(cores.bit_length()) if 2**i <= cores]
