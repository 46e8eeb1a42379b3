"""Throughput of shuffled batches from TokenCache, from webdataset on the same shards, and from a NumPy memmap.

Shape suffixes: N videos or clips, B clips of a batch, V views of a video, t h w (or T H W) the grid of codes.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

from data.cache import TokenCache
from data.loading import BatchPlan, TokenDataset, batches
from pipelines.benchmarks import Row, comparison
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache

_BATCH = 64
_ROUNDS = 5
_WARM_UP = 40
"""Untimed batches at the start, in which workers start, files are opened and shuffle buffers fill."""
_Readers = dict[str, Callable[[], Iterable[Any]]]


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Yield clips per second as medians over interleaved rounds. The start of the workers is not timed."""
    videos = numbered_videos(int(20_000 * scale) + 256)
    for views in (1, 4):
        cache = TokenCache.open(synthetic_cache(folder / f"{views}", videos, views=views, shard_size=50))
        unchecked = TokenCache.open(cache.address, checksums=False)
        array = folder / f"{views}.npy"
        np.save(array, np.concatenate([cache.codes(row) for row in range(len(cache))]))
        for workers in [2, 0] if views == 1 else [2]:
            readers: _Readers = {
                "cache": partial(_token_cache, cache, workers),
                "unchecked": partial(_token_cache, unchecked, workers),
                "memmap": partial(_loaded, _Mapped(array, len(cache), views), workers),
                "webdataset": partial(_webdataset, cache, workers, all_views=False),
            }
            if views > 1:
                readers["all views"] = partial(_webdataset, cache, workers, all_views=True)
            speeds = _clips_per_second(readers, int(1500 * scale) + 20)
            yield from _rows(speeds, views, workers)


def _rows(speeds: dict[str, float], views: int, workers: int) -> Iterator[Row]:
    what = f"shuffled batches, {views} view(s), " + (f"{workers} workers" if workers else "in the training process")
    for key, title, name, target in (
        ("webdataset", what, "webdataset, one view of each sample", "≥ 10"),
        ("all views", what, "webdataset, all views of each sample", ""),
        ("memmap", what, "numpy.memmap gather", "≥ 0.5"),
        ("unchecked", f"{what}, with checksums", "without checksums", "≥ 0.95"),
    ):
        if key in speeds:
            # The targets apply only to reading in worker processes.
            yield comparison(title, "clips/s", speeds["cache"], speeds[key], name, target if workers else "")


def _clips_per_second(readers: _Readers, batch_count: int) -> dict[str, float]:
    """Return the median throughput of each reader over the rounds. Each round starts with a different reader."""
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    order = list(readers.items())
    for _ in range(_ROUNDS):
        for name, reader in order:
            # webdataset is about twenty times slower, so it reads fewer batches.
            count = batch_count // 10 if name == "webdataset" else batch_count
            stream = iter(reader())
            for _ in islice(stream, _WARM_UP):
                pass
            began = time.perf_counter()
            clips = sum(len(batch) for batch in islice(stream, count))
            speeds[name].append(clips / (time.perf_counter() - began))
            # End the workers before the next reader is timed.
            del stream
        order.append(order.pop(0))
    return {name: statistics.median(values) for name, values in speeds.items()}


def _token_cache(cache: TokenCache, workers: int) -> Iterator[torch.Tensor]:
    plan = BatchPlan(samples=len(cache), batch_size=_BATCH, seed=0)
    return _loaded(TokenDataset(cache, range(len(cache)), plan), workers)


def _loaded(dataset: Dataset, workers: int) -> Iterator[torch.Tensor]:
    """Return an iterator over batches of int64 codes. TokenCache and the memmap share this data loader."""
    return (batch["codes_BTHW"] for batch in batches(dataset, range(10**6), workers))


class _Mapped(Dataset):
    """Batches gathered from a memmap: one view of each video, with the videos in a fixed random order."""

    def __init__(self, file: Path, videos: int, views: int) -> None:
        self._file, self._videos, self._views = file, videos, views
        self._codes_NTHW: np.ndarray | None = None
        self._order = np.random.default_rng(0).permutation(videos)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if self._codes_NTHW is None:
            self._codes_NTHW = np.load(self._file, mmap_mode="r")
        first = step * _BATCH % (self._videos - _BATCH)
        rows_B = self._order[first : first + _BATCH] * self._views + step % self._views
        return {"codes_BTHW": self._codes_NTHW[rows_B]}


def _webdataset(cache: TokenCache, workers: int, all_views: bool) -> Iterator[np.ndarray]:
    """Build the pipeline of webdataset's examples: shuffle shards and samples, decode, select views, batch."""
    urls = [f"{cache.address}/{shard.file}" for shard in cache.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False, seed=0)
    samples = dataset.map(_codes)
    clips = samples.compose(chain.from_iterable).shuffle(1000) if all_views else samples.shuffle(1000).map(_one_view)
    stages = clips.batched(_BATCH, collation_fn=np.stack).repeat()
    # Workers send NumPy arrays through a pipe. For small arrays this is faster than tensors in shared memory.
    settings: dict[str, Any] = {"batch_size": None, "num_workers": workers, "collate_fn": np.asarray}
    return iter(DataLoader(stages, multiprocessing_context="forkserver" if workers else None, **settings))


def _codes(sample: dict[str, Any]) -> np.ndarray:
    return np.load(io.BytesIO(sample["codes.npy"]), allow_pickle=False)


def _one_view(codes_Vthw: np.ndarray) -> np.ndarray:
    return codes_Vthw[np.random.randint(len(codes_Vthw))]
