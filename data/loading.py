"""Batches as a pure function of (seed, step, rank, world size): the state of a loader is one integer, the step.

Each epoch is a new permutation of the samples. Batches continue across the border of two epochs, so every epoch contains
each sample exactly once. Each rank reads an equal consecutive part of the global batch, so the sequence of global batches
does not depend on the number of ranks or workers. For a remote cache, blocks of a few neighbouring shards are permuted,
and the samples within each block, so that each shard is fetched once per epoch.

Legend: N samples, B samples of this rank, T H W codes or pixels, V views.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.cache import TokenCache
from data.cache.index import ClipIndex
from data.cache.storage import MEMORY
from data.clip_spec import ClipSpec
from data.clips import read_clips
from data.decoding import DamagedVideo
from data.processes import end_with_parent, shielded
from data.sources import Source
from data.text import one_line

Batch = dict[str, Any]
_LARGE = 2**19
"""Bytes from which shared memory is faster than a pipe."""


@dataclass(frozen=True)
class Draw:
    """Samples of one step on this rank, with random numbers for each sample.

    `view_B` and `other_B` in [0, 1) choose the view and a second view. `seed_B` seeds all later draws, such as masks.
    """

    rows_B: np.ndarray
    view_B: np.ndarray
    seed_B: np.ndarray
    other_B: np.ndarray


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Plan of the batches of all steps.

    Raises ValueError if there are no samples, or the batch does not divide evenly among the ranks.
    """

    samples: int
    batch_size: int
    """Samples of all ranks together."""
    seed: int
    rank: int = 0
    world: int = 1
    blocks_N: np.ndarray | None = None
    """Block number of each sample, ascending. Blocks are permuted, and samples within each block. None means one block."""
    _epochs: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ValueError(
                f"batch_size must be a positive multiple of the number of processes ({self.world}), got {self.batch_size}"
            )

    def draw(self, step: int) -> Draw:
        """Return the samples that this rank reads in a step."""
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
        """Return the columns of a `Draw` for all samples of an epoch, in order."""
        if epoch not in self._epochs:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            n = self.samples
            order, view, seed, other = rng.permutation(n), rng.random(n), rng.integers(2**63, size=n), rng.random(n)
            if self.blocks_N is not None:
                # The stable sort by block keeps the samples of a block in their random order.
                place_of_block = rng.permutation(self.blocks_N[-1] + 1)
                order = order[np.argsort(place_of_block[self.blocks_N[order]], kind="stable")]
            # Keep two epochs, because a batch covers at most two unless epochs are tiny.
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = (order, view, seed, other)
        return self._epochs[epoch]

    def __getstate__(self) -> dict[str, Any]:
        # A worker draws its epochs itself, which is cheaper than sending them.
        return {**self.__dict__, "_epochs": {}}


def blocks_of(cache: TokenCache, rows: Sequence[int]) -> np.ndarray | None:
    """Return the block number of each sample of a remote cache. Return None for a cache in a folder, which needs no blocks.

    A block is a run of neighbouring shards that fits into half of the memory for shards, so that two blocks fit at once. A
    larger shard is a block by itself.
    """
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
    """Dataset that maps a step to a batch of cached codes.

    A batch holds `codes_BTHW`, `slices_B` (number of time slices without padding), `seed_B` and `row_B` (row in the
    cache). With `pairs` it also holds `pair_BTHW` and `pair_slices_B` of another view of the same videos. With `pixels` it
    also holds `pixels_BTHWC` (uint8), the clips that were encoded.

    Raises ValueError with `pairs` if a video has only one view, and with `pixels` if the cache holds no pixels.
    """

    def __init__(
        self, cache: TokenCache, rows: Sequence[int], plan: BatchPlan, *, pairs: bool = False, pixels: bool = False
    ) -> None:
        self._clips, self._rows_N, self._plan, self._pairs = cache.clips, np.asarray(rows), plan, pairs
        self._cache = cache if pixels else None
        if pixels and cache.spec["keep_pixels"] == "none":
            raise ValueError(f"{cache.address}: holds no pixels; tokenize with --keep_pixels jpeg or raw")
        if pairs and (cache.views_N[self._rows_N] < 2).any():
            raise ValueError(f"{cache.address}: pairs need two views of every video; tokenize with --clip.views 2")

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


def _pixels(cache: TokenCache, row_B: np.ndarray, view_B: np.ndarray) -> np.ndarray:
    return np.stack([cache.pixels(int(row), int(view)) for row, view in zip(row_B, view_B, strict=True)])


class ClipDataset(Dataset):
    """Dataset that maps a step to a batch of decoded clips.

    A batch holds `pixels_BTHWC` (uint8), `real_B`, `row_B` (row in the list) and `skipped`. The clip of a damaged video
    is black, `real_B` is false for it, and `skipped` lists it as (path, reason). Views never change, so decoded views
    are stored for later steps as long as they fit into `memory` bytes.
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
            return self._kept.setdefault(row, damage)
        if views.nbytes <= self._free:
            self._kept[row] = views
            self._free -= views.nbytes
        return views

    def __getitem__(self, step: int) -> Batch:
        draw = self.plan.draw(step)
        row_B = np.asarray(self.rows)[draw.rows_B]
        pixels_BTHWC = np.zeros((len(row_B), self.spec.frames, self.spec.size, self.spec.size, 3), np.uint8)
        real_B, skipped = np.ones(len(row_B), bool), []
        for b, (row, view) in enumerate(zip(row_B.tolist(), draw.view_B, strict=True)):
            views = self._read(row)
            if isinstance(views, DamagedVideo):
                real_B[b] = False
                skipped.append((self.source.videos[row].path, str(views)))
            else:
                pixels_BTHWC[b] = pick_view(views, view)
        tensors = {"pixels_BTHWC": torch.from_numpy(pixels_BTHWC), "real_B": torch.from_numpy(real_B)}
        return {**tensors, "row_B": row_B, "skipped": skipped}


def pick_view(views: np.ndarray, draw: float) -> np.ndarray:
    """Choose one of the views along the first axis by a number in [0, 1)."""
    return views[int(draw * len(views))]


def batches(dataset: Dataset, steps: range, workers: int, pin: bool = False) -> Iterator[Batch]:
    """Load the batches of `steps`, in order, ahead of time in `workers` processes. 0 loads on demand in this process.

    `pin` puts the tensors into pinned memory, from which they can be copied to a GPU while it works. It needs a GPU.

    Raises:
        OSError, ValueError: unchanged from the dataset; OSError also if a worker cannot be started or has died.
    """
    # A forked worker would inherit locks of threads that it does not have. A fork server has no other threads.
    context = multiprocessing.get_context("forkserver") if workers else None
    if context:
        # The server imports torch once; otherwise every worker would import it.
        context.set_forkserver_preload(["data.loading"])
    loader = DataLoader(
        _ErrorForwardingDataset(dataset),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context=context,
        # This pins tensors in a thread if there are workers.
        pin_memory=pin,
        # Without batch_size, this function gets one item.
        collate_fn=_for_sending if workers else lambda batch: batch,  # type: ignore[arg-type, return-value]
        worker_init_fn=end_with_parent if workers else None,
    )
    loaded = map(_as_tensors, _from_workers(loader, workers) if workers else loader)
    return map(_pinned, loaded) if pin else loaded


_REMEDY = "enlarge /dev/shm if it is small (docker run --shm-size 8g), or use --workers 0"


def _from_workers(loader: DataLoader, workers: int) -> Iterator[Batch]:
    """Start the workers, and return the batches. Raises OSError if a worker cannot be started or has died."""
    try:
        with shielded():
            loaded = iter(loader)
    except OSError as error:
        raise OSError(f"--workers {workers}: the loading processes cannot be started ({error}); {_REMEDY}") from None

    def checked() -> Iterator[Batch]:
        try:
            yield from loaded
        # A worker that dies while it sends a batch breaks its connection.
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = one_line(error, 200)
            raise OSError(f"--workers {workers}: a loading process has died ({reason}); {_REMEDY}") from None

    return checked()


def _pinned(batch: Batch) -> Batch:
    """Pin the tensors that are not pinned yet: those of small arrays, and codes after their conversion to int64."""
    return {k: v.pin_memory() if isinstance(v, torch.Tensor) and not v.is_pinned() else v for k, v in batch.items()}


def _for_sending(batch: Batch) -> Batch:
    """Put large arrays and tensors into shared memory, which sends any size in 0.5 ms. All others are sent through a pipe."""
    return {key: _sendable(v) if isinstance(v, np.ndarray | torch.Tensor) else v for key, v in batch.items()}


def _sendable(value: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    tensor = torch.as_tensor(value)
    if tensor.nbytes >= _LARGE:
        # Without room in /dev/shm, for example in a container, the pipe is slow but works. Here an error can be caught: in the
        # thread that sends the batch, the batch would be lost and the training would wait for it for ever.
        with suppress(RuntimeError):
            return tensor.share_memory_()
    return tensor.numpy()


class _ErrorForwardingDataset(Dataset):
    """Dataset that returns errors as items, because a worker would add its traceback to the message of a raised error."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> Batch:
        try:
            return self._dataset[step]
        except (ValueError, OSError) as error:
            return {"error": error}


def _as_tensors(batch: Batch) -> Batch:
    """Convert arrays to tensors and codes to int64, or raise a forwarded error."""
    if "error" in batch:
        raise batch["error"]
    tensors = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in batch.items()}
    return {key: v.long() if key.endswith("_BTHW") else v for key, v in tensors.items()}


def evaluation_batches(
    cache: TokenCache, rows: Sequence[int], batch_size: int, *, pixels: bool = False
) -> Iterator[Batch]:
    """Yield batches of the canonical view of each row, in order, as `view_batches`."""
    yield from view_batches(cache, [(row, cache.canonical(row)) for row in rows], batch_size, pixels=pixels)


def view_batches(
    cache: TokenCache, places: Sequence[tuple[int, int]], batch_size: int, *, pixels: bool = False
) -> Iterator[Batch]:
    """Yield batches of chosen views, given as (row, view), in order. The last batch may be smaller.

    `seed_B` depends only on the row. With `pixels` the batches also hold `pixels_BTHWC`, as in TokenDataset.
    """
    for first in range(0, len(places), batch_size):
        row_B, view_B = np.array(places[first : first + batch_size]).T
        batch = {**_codes(cache.clips, row_B, view_B), "seed_B": row_B, "row_B": row_B}
        if pixels:
            batch["pixels_BTHWC"] = _pixels(cache, row_B, view_B)
        yield _as_tensors(batch)
