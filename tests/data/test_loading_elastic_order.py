"""R3 and R4: the order of samples depends on the seed only, and every sample comes once per epoch, however many share it."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import TokenCache
from data.loading import Batch, BatchPlan, TokenDataset, batches
from tests.helpers.caches import MakeCache

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def of_all_ranks(
    cache: TokenCache, batch_size: int, seed: int, world: int, workers: int, steps: range
) -> Iterator[list[Batch]]:
    """For each step the batches of all ranks. It ends when all of them do, and fails unless they do so together."""
    plans = [BatchPlan(samples=len(cache), batch_size=batch_size, seed=seed, rank=r, world=world) for r in range(world)]
    loaders = [batches(TokenDataset(cache, range(len(cache)), plan), steps, workers) for plan in plans]
    yield from map(list, zip(*loaders, strict=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> TokenCache:
    """Eleven videos, so that no batch fits into an epoch evenly, with codes of four bytes."""
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("caches"), 11, vocab_size=2**18, views=3))


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_processes_and_workers(
    cache: TokenCache, world: int, workers: int
) -> None:
    steps = range(2, 7)  # 40 samples: across the borders of four epochs
    dataset = TokenDataset(cache, range(11), BatchPlan(samples=11, batch_size=8, seed=5))
    found = list(of_all_ranks(cache, 8, 5, world, workers, steps))
    assert len(found) == len(steps)
    for step, parts in zip(steps, found, strict=True):
        assert {len(part["row_B"]) for part in parts} == {8 // world}
        for key, expected in dataset[step].items():
            whole = torch.cat([part[key] for part in parts])
            assert whole.dtype == torch.int64
            assert np.array_equal(whole.numpy(), expected)


@dataclass(frozen=True)
class Case:
    """How many share a cache of how many shards."""

    shards: int
    shard_size: int
    last: int
    """Videos of the last shard."""
    ranks: int
    workers: int
    share: int
    """Samples of a batch on each rank."""
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
def cache_of(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> "CacheOf":
    return CacheOf(tmp_path_factory.mktemp("many"), make_cache)


class CacheOf:
    """A cache of as many shards and videos as a case has, made once."""

    def __init__(self, folder: Path, make_cache: MakeCache) -> None:
        self._folder, self._make = folder, make_cache
        self._made: dict[tuple[int, int], TokenCache] = {}

    def __call__(self, case: Case) -> TokenCache:
        which = (case.videos, case.shard_size)
        if which not in self._made:
            folder = self._folder / str(case.shard_size)
            made = self._make(folder, case.videos, shard_size=case.shard_size, codes_shape=(1, 1, 2), views=1)
            self._made[which] = TokenCache.open(made)
        assert len(self._made[which].shards) == case.shards
        return self._made[which]


def assert_exactly_once(cache: TokenCache, case: Case, workers: int, epochs: int) -> None:
    """All ranks make equally many steps, and within each epoch every sample comes on one of them, once."""
    batch_size = case.share * case.ranks
    steps = range(-(-epochs * case.videos // batch_size))
    rows: list[int] = []
    for parts in of_all_ranks(cache, batch_size, case.seed, case.ranks, workers, steps):
        assert {len(part["row_B"]) for part in parts} == {case.share}
        for part in parts:
            rows += part["row_B"].tolist()
            expected = [cache.codes(row)[0] for row in part["row_B"].tolist()]
            assert np.array_equal(part["codes_BTHW"].numpy(), expected)
    assert len(rows) == len(steps) * batch_size
    for epoch in range(epochs):
        assert sorted(rows[epoch * case.videos : (epoch + 1) * case.videos]) == list(range(case.videos))


def test_the_cases_have_all_that_is_to_be_tried() -> None:
    assert {case.shards for case in CASES} == set(range(1, 21))
    assert {case.ranks for case in CASES} == set(range(1, 9))
    assert {case.workers for case in CASES} == set(range(5))
    assert sum(case.shards < case.ranks for case in CASES) > 20
    assert sum(case.videos < case.ranks for case in CASES) > 3


def test_every_sample_comes_once_per_epoch_in_200_random_cases(cache_of: CacheOf) -> None:
    for case in CASES:
        assert_exactly_once(cache_of(case), case, workers=0, epochs=3)


def with_workers() -> list[object]:
    """Twenty of the cases; the first three of them in every run."""
    few = [case for case in CASES if case.workers][:20]
    few.sort(key=lambda case: case.ranks * case.workers)
    return [pytest.param(c, id=str(c.seed), marks=[] if i < 3 else pytest.mark.soak) for i, c in enumerate(few)]


@pytest.mark.parametrize("case", with_workers())
def test_every_sample_comes_once_per_epoch_from_worker_processes(cache_of: CacheOf, case: Case) -> None:
    assert_exactly_once(cache_of(case), case, case.workers, epochs=2)
