"""The order of samples depends on the seed only. Every sample comes once per epoch for any number of ranks and workers."""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data.cache import TokenCache
from data.loading import Batch, BatchPlan, TokenDataset, batches
from tests.helpers.caches import make_cache

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def batches_of_all_ranks(
    cache: TokenCache, batch_size: int, seed: int, world: int, workers: int, steps: range
) -> Iterator[list[Batch]]:
    """Yield the batches of all ranks for each step. Fail unless all ranks have equally many steps."""
    plans = [BatchPlan(samples=len(cache), batch_size=batch_size, seed=seed, rank=r, world=world) for r in range(world)]
    loaders = [batches(TokenDataset(cache, range(len(cache)), plan), steps, workers) for plan in plans]
    yield from map(list, zip(*loaders, strict=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """Cache of eleven videos, so that batches cross the borders of epochs, with codes of four bytes."""
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("caches"), 11, vocab_size=2**18, views=3))


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_ranks_and_workers(cache: TokenCache, world: int, workers: int) -> None:
    steps = range(2, 7)  # 40 samples, from four epochs
    dataset = TokenDataset(cache, range(11), BatchPlan(samples=11, batch_size=8, seed=5))
    loaded = list(batches_of_all_ranks(cache, 8, 5, world, workers, steps))
    assert len(loaded) == len(steps)
    for step, parts in zip(steps, loaded, strict=True):
        assert {len(part["row_B"]) for part in parts} == {8 // world}
        for key, expected in dataset[step].items():
            global_batch = torch.cat([part[key] for part in parts])
            assert global_batch.dtype == torch.int64
            assert np.array_equal(global_batch.numpy(), expected)


CacheOf = Callable[["Case"], TokenCache]


@dataclass(frozen=True)
class Case:
    """Sizes of a cache and numbers of its readers."""

    shards: int
    shard_size: int
    last: int
    """Videos in the last shard."""
    ranks: int
    workers: int
    share: int
    """Samples of a batch on one rank."""
    seed: int

    @property
    def videos(self) -> int:
        return (self.shards - 1) * self.shard_size + self.last


def random_cases(count: int) -> list[Case]:
    draw = random.Random(0)
    cases = []
    for seed in range(count):
        shards, size = draw.randint(1, 20), draw.randint(1, 3)
        last, ranks, workers = draw.randint(1, size), draw.randint(1, 8), draw.randint(0, 4)
        cases.append(Case(shards, size, last, ranks, workers, draw.randint(1, 4), seed))
    return cases


CASES = random_cases(200)


@pytest.fixture(scope="module")
def cache_of(tmp_path_factory: pytest.TempPathFactory) -> CacheOf:
    """Function that returns a cache of the size of a case. Cases of the same size share a cache."""
    root = tmp_path_factory.mktemp("caches")

    @functools.cache
    def open_cache(videos: int, shard_size: int) -> TokenCache:
        folder = root / str(shard_size)
        return TokenCache.open(make_cache(folder, videos, shard_size=shard_size, codes_shape=(1, 1, 2), views=1))

    def cache_of(case: Case) -> TokenCache:
        cache = open_cache(case.videos, case.shard_size)
        assert len(cache.shards) == case.shards
        return cache

    return cache_of


def assert_exactly_once(cache: TokenCache, case: Case, workers: int, epochs: int) -> None:
    """Assert that all ranks have equally many steps, and that each sample comes once per epoch, on one rank."""
    batch_size = case.share * case.ranks
    steps = range(-(-epochs * case.videos // batch_size))
    rows: list[int] = []
    for parts in batches_of_all_ranks(cache, batch_size, case.seed, case.ranks, workers, steps):
        assert {len(part["row_B"]) for part in parts} == {case.share}
        for part in parts:
            rows += part["row_B"].tolist()
            expected = [cache.codes(row)[0] for row in part["row_B"].tolist()]
            assert np.array_equal(part["codes_BTHW"].numpy(), expected)
    assert len(rows) == len(steps) * batch_size
    for epoch in range(epochs):
        assert sorted(rows[epoch * case.videos : (epoch + 1) * case.videos]) == list(range(case.videos))


def test_cases_cover_all_sizes() -> None:
    assert {case.shards for case in CASES} == set(range(1, 21))
    assert {case.ranks for case in CASES} == set(range(1, 9))
    assert {case.workers for case in CASES} == set(range(5))
    assert sum(case.shards < case.ranks for case in CASES) > 20
    assert sum(case.videos < case.ranks for case in CASES) > 3


def test_samples_come_once_per_epoch_in_random_cases(cache_of: CacheOf) -> None:
    for case in CASES:
        assert_exactly_once(cache_of(case), case, workers=0, epochs=3)


def with_workers() -> list[object]:
    """Twenty cases, ordered by their number of processes. All but the first three run only as soak tests."""
    few = [case for case in CASES if case.workers][:20]
    few.sort(key=lambda case: case.ranks * case.workers)
    return [pytest.param(c, id=str(c.seed), marks=[] if i < 3 else pytest.mark.soak) for i, c in enumerate(few)]


@pytest.mark.parametrize("case", with_workers())
def test_samples_come_once_per_epoch_from_worker_processes(cache_of: CacheOf, case: Case) -> None:
    assert_exactly_once(cache_of(case), case, case.workers, epochs=2)
