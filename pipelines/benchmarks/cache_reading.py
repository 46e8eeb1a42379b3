"""Shuffled batches from a cache, from the same shards through webdataset, and from one array of the same bytes.

Legend: N clips, B clips of a batch, t h w the grid of codes.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

from data.cache import TokenCache
from data.loading import BatchPlan, TokenDataset, batches
from pipelines.benchmarks import Row
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache

_BATCH = 64
_ROUNDS = 5


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Clips per second, medians of rounds that take turns, after the workers have started."""
    videos = numbered_videos(int(20_000 * scale) + 256)
    for views in (1, 4):
        cache = TokenCache.open(synthetic_cache(folder / f"{views}", videos, views=views, shard_size=50))
        unchecked = TokenCache.open(cache.address, checksums=False)
        mapped = _one_array(folder / f"{views}.bin", cache)
        for workers in (2, 0) if views == 1 else (2,):
            ways: dict[str, Callable[[], Iterable[Any]]] = {
                "ours": partial(_ours, cache, workers),
                "unchecked": partial(_ours, unchecked, workers),
                "memmap": partial(_loaded, _Mapped(mapped, len(cache), views), workers),
                "webdataset": partial(_webdataset, cache, workers, all_views=False),
            }
            if views > 1:
                ways["all views"] = partial(_webdataset, cache, workers, all_views=True)
            speeds = _race(ways, int(1500 * scale) + 20)
            yield from _rows(speeds, views, workers)


def _rows(speeds: dict[str, float], views: int, workers: int) -> Iterator[Row]:
    what = f"shuffled batches, {views} view(s), " + (f"{workers} workers" if workers else "in the training process")
    bar = bool(workers)
    yield _row(what, speeds, "webdataset", "webdataset's pipeline, one view of a sample", "≥ 10" if bar else "")
    if "all views" in speeds:
        yield _row(what, speeds, "all views", "webdataset's pipeline, all views of a sample one after the other", "")
    yield _row(what, speeds, "memmap", "numpy.memmap gather", "≥ 0.5" if bar else "")
    yield _row(f"{what}, checked", speeds, "unchecked", "checksums=False", "≥ 0.95" if bar else "")


def _row(what: str, speeds: dict[str, float], peer: str, name: str, reach: str) -> Row:
    ratio = speeds["ours"] / speeds[peer]
    return Row(
        what=what, unit="clips/s", ours=speeds["ours"], peer=speeds[peer], alternative=name, ratio=ratio, reach=reach
    )


def _race(ways: dict[str, Callable[[], Iterable[Any]]], count: int) -> dict[str, float]:
    """Clips per second of each, in another order each round; webdataset gets a tenth of the batches, it is slow."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways.items())
    for round_ in range(_ROUNDS):
        for name, way in order[round_ % len(order) :] + order[: round_ % len(order)]:
            wanted = count // 10 if name == "webdataset" else count
            stream = iter(way())
            for _ in islice(stream, 40):  # workers start, files are opened, shuffle buffers fill
                pass
            began = time.perf_counter()
            clips = sum(len(batch) for batch in islice(stream, wanted))
            seen[name].append(clips / (time.perf_counter() - began))
            del stream
    return {name: statistics.median(speeds) for name, speeds in seen.items()}


def _ours(cache: TokenCache, workers: int) -> Iterator[torch.Tensor]:
    plan = BatchPlan(samples=len(cache), batch_size=_BATCH, seed=0)
    return _loaded(TokenDataset(cache, range(len(cache)), plan), workers)


def _loaded(dataset: Dataset, workers: int) -> Iterator[torch.Tensor]:
    """The same way from the workers to int64 tensors for both."""
    return (batch["codes_BTHW"] for batch in batches(dataset, range(10**6), workers))


def _one_array(file: Path, cache: TokenCache) -> tuple[Path, tuple[int, ...]]:
    """All clips of a cache in one file, the simplest thing that could be read."""
    shape = (int(cache.views_N.sum()), *cache.codes_shape)
    array = np.memmap(file, "<u2", "w+", shape=shape)
    first_N = np.cumsum(cache.views_N) - cache.views_N
    for row, first in enumerate(first_N):
        array[first : first + cache.views_N[row]] = cache.codes(row)
    array.flush()
    return file, shape


class _Mapped(Dataset):
    """Step -> batch, gathered from a mapped array; one view of each video, in a new order each epoch."""

    def __init__(self, mapped: tuple[Path, tuple[int, ...]], videos: int, views: int) -> None:
        self._mapped, self._videos, self._views = mapped, videos, views
        self._codes_NTHW: np.ndarray | None = None
        self._order = np.random.default_rng(0).permutation(videos)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if self._codes_NTHW is None:
            self._codes_NTHW = np.memmap(self._mapped[0], "<u2", "r", shape=self._mapped[1])
        first = step * _BATCH % (self._videos - _BATCH)
        rows_B = self._order[first : first + _BATCH] * self._views + step % self._views
        return {"codes_BTHW": self._codes_NTHW[rows_B]}


def _webdataset(cache: TokenCache, workers: int, all_views: bool) -> Iterator[np.ndarray]:
    """The pipeline of webdataset's own examples: shards and samples shuffled, decoded, views taken, batched."""
    urls = [f"{cache.address}/{shard.file}" for shard in cache.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False, seed=0)
    samples = dataset.map(_codes)
    clips = samples.compose(_each_view).shuffle(1000) if all_views else samples.shuffle(1000).map(_one_view)
    stages = clips.batched(_BATCH, collation_fn=np.stack).repeat()
    context = "forkserver" if workers else None
    loader = DataLoader(
        stages,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
    )
    return iter(loader)


def _codes(sample: dict[str, Any]) -> np.ndarray:
    return np.load(io.BytesIO(sample["codes.npy"]), allow_pickle=False)


def _one_view(codes_Vthw: np.ndarray) -> np.ndarray:
    return codes_Vthw[np.random.randint(len(codes_Vthw))]


def _each_view(samples: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for codes_Vthw in samples:
        yield from codes_Vthw


def _as_it_is(batch: np.ndarray) -> np.ndarray:
    """Small arrays go through a pipe, as ours do: shared memory would cost more."""
    return batch
