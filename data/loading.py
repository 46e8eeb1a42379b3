"""Batches as a pure function of (seed, step, rank, world size): the state of a loader is one integer.

Samples come in epochs, each a fresh permutation; batches run across the border of two epochs, so every sample comes
exactly once per epoch and none is dropped. The global batch is cut into equal consecutive parts, one per process, so
the sequence of global batches does not depend on the number of processes or workers. Behind an address the permutation
is one of shards, and of samples within a few neighbouring shards, so that each shard is fetched once per epoch.

Legend: N samples, B samples of this process, T H W codes or pixels, V views.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.cache import TokenCache
from data.cache.index import ClipIndex
from data.cache.storage import MEMORY
from data.clips import ClipSpec, read_clips
from data.decoding import DamagedVideo
from data.sources import Source

Batch = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """What one step reads: samples, a number in [0, 1) that chooses the view, a seed for everything drawn later, and a
    number that chooses a second view."""

    rows_B: np.ndarray
    view_B: np.ndarray
    seed_B: np.ndarray
    other_B: np.ndarray


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batch of every step.

    Raises:
        ValueError: if there is nothing to draw from or the batch cannot be shared evenly.
    """

    samples: int
    batch_size: int
    """Of all processes together."""
    seed: int
    rank: int = 0
    world: int = 1
    blocks_N: np.ndarray | None = None
    """Block of each sample, rising: samples are permuted within blocks, and the blocks; None: all of them at once."""
    _epochs: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("there are no samples to draw batches from")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ValueError(f"batch_size {self.batch_size} does not divide evenly among {self.world} processes")

    def draw(self, step: int) -> Draw:
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        last = first + share - 1
        parts = []
        for epoch in range(first // self.samples, last // self.samples + 1):
            begin = max(first - epoch * self.samples, 0)
            end = min(last + 1 - epoch * self.samples, self.samples)
            parts.append([column[begin:end] for column in self._epoch(epoch)])
        return Draw(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, ...]:
        if epoch not in self._epochs:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            n = self.samples
            order, view, seed, other = rng.permutation(n), rng.random(n), rng.integers(2**63, size=n), rng.random(n)
            if self.blocks_N is not None:
                turn = rng.permutation(self.blocks_N[-1] + 1)
                order = order[np.argsort(turn[self.blocks_N[order]], kind="stable")]
            while len(self._epochs) > 1:  # a batch reaches into two epochs at most, unless epochs are tiny
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = (order, view, seed, other)
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}


def blocks_of(cache: TokenCache, rows: Sequence[int]) -> np.ndarray | None:
    """The blocks in which the samples of a remote cache are read: neighbouring shards of which half the memory for them
    holds all, so that the next block fits beside them; a larger shard is one by itself. None for a cache in a folder,
    where any sample is as near as any other."""
    if not cache.remote:
        return None
    block, room = -1, 0
    block_of_shard = np.zeros(len(cache.shards), np.int64)
    for number, shard in enumerate(cache.shards):
        if shard.bytes > room:
            block, room = block + 1, MEMORY // 2
        room -= shard.bytes
        block_of_shard[number] = block
    return np.unique(block_of_shard[cache.clips.shard_N[np.asarray(rows)]], return_inverse=True)[1]


class TokenDataset(Dataset):
    """Step -> batch of cached codes: `codes_BTHW`, `slices_B` (slices of time that are no padding), `seed_B`, `row_B` (place
    in the cache).

    With `pairs` also `pair_BTHW` and `pair_slices_B`, of another view of the same videos; with `pixels` also
    `pixels_BTHWC` (uint8), the clips behind the codes.

    Raises:
        ValueError: if pairs are wanted of a video that has one view only, or pixels of a cache that kept none.
    """

    def __init__(
        self,
        cache: TokenCache,
        rows: Sequence[int],
        plan: BatchPlan,
        *,
        pairs: bool = False,
        pixels: bool = False,
    ) -> None:
        self._clips, self._rows_N, self._plan, self._pairs = cache.clips, np.asarray(rows), plan, pairs
        self._cache = cache if pixels else None
        if pixels:
            check_pixels_kept(cache)
        if pairs and (cache.views_N[self._rows_N] < 2).any():
            raise ValueError(
                f"{cache.address}: pairs need two views of every video; make it with --clip.views 2 or more"
            )

    def __getitem__(self, step: int) -> Batch:
        draw = self._plan.draw(step)
        rows_B = self._rows_N[draw.rows_B]
        count_B = self._clips.views_N[rows_B]
        view_B = (draw.view_B * count_B).astype(np.int64)
        batch = {**_codes(self._clips, rows_B, view_B), "seed_B": draw.seed_B, "row_B": rows_B}
        if self._pairs:
            other_B = (view_B + 1 + (draw.other_B * (count_B - 1)).astype(np.int64)) % count_B
            pair = _codes(self._clips, rows_B, other_B)
            batch |= {"pair_BTHW": pair["codes_BTHW"], "pair_slices_B": pair["slices_B"]}
        if self._cache is not None:
            batch["pixels_BTHWC"] = _pixels(self._cache, rows_B, view_B)
        return batch


def _codes(clips: ClipIndex, row_B: np.ndarray, view_B: np.ndarray) -> Batch:
    return {"codes_BTHW": clips.gather(row_B, view_B), "slices_B": clips.slices(row_B, view_B)}


def check_pixels_kept(cache: TokenCache) -> None:
    """Raise a ValueError for a cache that kept no pixels."""
    if cache.spec["keep_pixels"] == "none":
        raise ValueError(f"{cache.address}: holds no pixels; make it with --keep_pixels jpeg or raw")


def _pixels(cache: TokenCache, row_B: np.ndarray, view_B: np.ndarray) -> np.ndarray:
    return np.stack([cache.pixels(int(row), int(view)) for row, view in zip(row_B, view_B, strict=True)])


class ClipDataset(Dataset):
    """Step -> batch of decoded clips: `pixels_BTHWC` (uint8), `real_B`, `row_B` (place in the list), `skipped`.

    A damaged video leaves its place in the batch black and false in `real_B`, and is in `skipped` as (path, reason).
    Views never change, so what was decoded once is kept, as long as it fits into `memory` bytes.
    """

    def __init__(
        self, source: Source, rows: Sequence[int], spec: ClipSpec, plan: BatchPlan, memory: int = 2**30
    ) -> None:
        self.source, self.rows, self.spec, self.plan = source, rows, spec, plan
        self._free = memory
        self._kept: dict[int, np.ndarray | DamagedVideo] = {}

    def _read(self, row: int) -> np.ndarray | DamagedVideo:
        if row in self._kept:
            return self._kept[row]
        try:
            views = read_clips(self.source, self.source.videos[row], self.spec).pixels_VTHWC
        except DamagedVideo as damage:
            self._kept[row] = damage
            return damage
        if views.nbytes <= self._free:
            self._kept[row] = views
            self._free -= views.nbytes
        return views

    def __getitem__(self, step: int) -> Batch:
        draw = self.plan.draw(step)
        shape = (self.spec.frames, self.spec.size, self.spec.size, 3)
        pixels = np.zeros((len(draw.rows_B), *shape), np.uint8)
        real, skipped = np.ones(len(pixels), bool), []
        for b, (i, view) in enumerate(zip(draw.rows_B, draw.view_B, strict=True)):
            views = self._read(self.rows[i])
            if isinstance(views, DamagedVideo):
                real[b] = False
                skipped.append((self.source.videos[self.rows[i]].path, str(views)))
            else:
                pixels[b] = pick_view(views, view)
        row_B = np.asarray(self.rows)[draw.rows_B]
        return {
            "pixels_BTHWC": torch.from_numpy(pixels),
            "real_B": torch.from_numpy(real),
            "row_B": row_B,
            "skipped": skipped,
        }


def pick_view(views: np.ndarray, draw: float) -> np.ndarray:
    """One of the views along the first axis, by a number in [0, 1)."""
    return views[int(draw * len(views))]


def batches(dataset: Dataset, steps: range, workers: int) -> Iterator[Batch]:
    """The batches of `steps`, in order, made ahead by `workers` processes (0: in this one)."""
    # Forked workers inherit the locks of threads that do not exist in them; a fork server starts clean.
    context = multiprocessing.get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload(["data.loading"])  # torch is imported once, not by every worker
    loader = DataLoader(
        _ErrorForwardingDataset(dataset),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=_as_sent,  # type: ignore[arg-type]  # without batch_size it gets one item
    )
    return map(_as_tensors, loader)


def _as_sent(batch: Batch) -> Batch:
    """Arrays travel from a worker through a pipe; large ones as tensors, for those do in shared memory, which costs half a
    millisecond whatever its size."""
    large = {key: torch.from_numpy(v) for key, v in batch.items() if isinstance(v, np.ndarray) and v.nbytes >= 2**19}
    return {**batch, **large}


class _ErrorForwardingDataset(Dataset):
    """Gives back the errors of a dataset, for a worker would wrap them into a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> Batch:
        try:
            return self._dataset[step]
        except (ValueError, OSError) as error:
            return {"error": error}


def _as_tensors(batch: Batch) -> Batch:
    """Codes and numbers as int64; an error is raised."""
    if "error" in batch:
        raise batch["error"]
    tensors = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in batch.items()}
    return {key: v.long() if key.endswith("_BTHW") else v for key, v in tensors.items()}


def evaluation_batches(
    cache: TokenCache, rows: Sequence[int], batch_size: int, *, pixels: bool = False
) -> Iterator[Batch]:
    """The canonical view of each row, in order; the last batch may be smaller. `seed_B` depends on the row only.

    With `pixels` the batches have them, as those of TokenDataset do.
    """
    for first in range(0, len(rows), batch_size):
        row_B = np.asarray(rows[first : first + batch_size])
        view_B = np.array([cache.canonical(row) for row in row_B])
        batch = {**_codes(cache.clips, row_B, view_B), "seed_B": row_B, "row_B": row_B}
        if pixels:
            batch["pixels_BTHWC"] = _pixels(cache, row_B, view_B)
        yield _as_tensors(batch)
