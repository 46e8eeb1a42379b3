"""Batches as a pure function of (seed, step, rank, world size): the state of a loader is one integer.

Samples come in epochs, each a fresh permutation; batches run across the border of two epochs, so every sample comes
exactly once per epoch and none is dropped. The global batch is cut into equal consecutive parts, one per process, so
the sequence of global batches does not depend on the number of processes or workers.

Legend: B samples of this process, T H W codes or pixels, V views.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.cache import TokenCache
from data.clips import ClipSpec, read_clips
from data.decoding import DamagedVideo
from data.sources import Source

Batch = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """What one step reads: samples, a number in [0, 1) that chooses the view, and a seed for everything drawn later."""

    rows_B: np.ndarray
    view_B: np.ndarray
    seed_B: np.ndarray


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

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("there are no samples to draw batches from")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ValueError(f"batch_size {self.batch_size} does not divide evenly among {self.world} processes")

    def draw(self, step: int) -> Draw:
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        places = [divmod(first + i, self.samples) for i in range(share)]
        draws = [[column[place] for column in _epoch(self.samples, self.seed, epoch)] for epoch, place in places]
        rows, views, seeds = zip(*draws, strict=True)
        return Draw(np.array(rows), np.array(views), np.array(seeds))


@functools.lru_cache(maxsize=2)
def _epoch(samples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return rng.permutation(samples), rng.random(samples), rng.integers(2**63, size=samples)


class TokenDataset(Dataset):
    """Step -> batch of cached codes: `codes_BTHW`, `seed_B`, `row_B` (place in the cache)."""

    def __init__(self, cache: TokenCache, rows: Sequence[int], plan: BatchPlan) -> None:
        self.cache, self.rows, self.plan = cache, rows, plan

    def __getitem__(self, step: int) -> Batch:
        draw = self.plan.draw(step)
        rows_B = [self.rows[i] for i in draw.rows_B]
        codes = [pick_view(self.cache.codes(row), view) for row, view in zip(rows_B, draw.view_B, strict=True)]
        return {"codes_BTHW": _as_codes(codes), "seed_B": torch.from_numpy(draw.seed_B), "row_B": torch.tensor(rows_B)}


class ClipDataset(Dataset):
    """Step -> batch of decoded clips: `pixels_BTHWC` (uint8), `real_B`, `skipped`.

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
        return {"pixels_BTHWC": torch.from_numpy(pixels), "real_B": torch.from_numpy(real), "skipped": skipped}


def pick_view(views: np.ndarray, draw: float) -> np.ndarray:
    """One of the views along the first axis, by a number in [0, 1)."""
    return views[int(draw * len(views))]


def _as_codes(codes: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(codes).astype(np.int64))


def batches(dataset: Dataset, steps: range, workers: int) -> Iterator[Batch]:
    """The batches of `steps`, in order, made ahead by `workers` processes (0: in this one)."""
    # Forked workers inherit the locks of threads that do not exist in them; a fork server starts clean.
    context = "forkserver" if workers else None
    return iter(
        DataLoader(dataset, batch_size=None, sampler=steps, num_workers=workers, multiprocessing_context=context)
    )


def evaluation_batches(cache: TokenCache, rows: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """The canonical view of each row, in order; the last batch may be smaller. `seed_B` depends on the row only."""
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        codes = [cache.codes(row)[0] for row in part]
        yield {"codes_BTHW": _as_codes(codes), "seed_B": torch.tensor(part), "row_B": torch.tensor(part)}
