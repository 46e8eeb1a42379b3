"""Block-wise order of a remote cache: each shard is fetched once per epoch, and every sample still comes once."""

from pathlib import Path

import numpy as np
import pytest

import data.loading
from data.cache import TokenCache
from data.loading import BatchPlan, blocks_of
from tests.helpers.caches import make_cache
from tests.helpers.web_server import serving

BLOCKS = {
    "one": [0] * 12,
    "equal": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "uneven": [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3],
    "each its own": list(range(12)),
}


def rows_of(plan: BatchPlan, epochs: int) -> np.ndarray:
    """Return the samples of each epoch, in order, (epochs, samples)."""
    rows = np.concatenate([plan.draw(step).rows_B for step in range(-(-epochs * plan.samples // plan.batch_size))])
    return rows[: epochs * plan.samples].reshape(epochs, plan.samples)


def runs(values: np.ndarray) -> list[int]:
    """Return the values without consecutive repetitions."""
    return [int(v) for i, v in enumerate(values) if i == 0 or v != values[i - 1]]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("batch_size", [1, 5, 12, 30])
def test_samples_come_once_per_epoch_and_blocks_are_not_mixed(kind: str, batch_size: int) -> None:
    blocks_N = np.array(BLOCKS[kind])
    plan = BatchPlan(samples=12, batch_size=batch_size, seed=4, blocks_N=blocks_N)
    for rows in rows_of(plan, 5):
        assert sorted(rows) == list(range(12))
        assert sorted(runs(blocks_N[rows])) == sorted(set(BLOCKS[kind])), "one block after the other"


def test_orders_of_and_within_blocks_differ_between_epochs_and_seeds() -> None:
    blocks_N = np.repeat(np.arange(8), 6)
    block_orders, inner_orders = [], []
    for seed in (0, 1):
        for rows in rows_of(BatchPlan(samples=48, batch_size=7, seed=seed, blocks_N=blocks_N), 3):
            block_orders.append(tuple(runs(blocks_N[rows])))
            inner_orders.append(tuple(rows[blocks_N[rows] == 3]))
    assert len(set(block_orders)) == 6
    assert len(set(inner_orders)) == 6


def test_every_block_and_sample_is_equally_likely_to_be_first() -> None:
    blocks_N = np.repeat(np.arange(4), 3)
    rows = rows_of(BatchPlan(samples=12, batch_size=12, seed=0, blocks_N=blocks_N), 1200)
    first_blocks = np.bincount(blocks_N[rows[:, 0]], minlength=4)
    first_rows = np.bincount(rows[:, 0], minlength=12)
    assert np.abs(first_blocks - 300).max() < 75
    assert np.abs(first_rows - 100).max() < 50


def test_global_batches_with_blocks_do_not_depend_on_the_world_size() -> None:
    blocks_N = np.array(BLOCKS["uneven"])
    one = BatchPlan(samples=12, batch_size=8, seed=5, blocks_N=blocks_N)
    for world in (2, 4, 8):
        ranks = [
            BatchPlan(samples=12, batch_size=8, seed=5, rank=r, world=world, blocks_N=blocks_N) for r in range(world)
        ]
        for step in range(10):
            assert np.array_equal(np.concatenate([plan.draw(step).rows_B for plan in ranks]), one.draw(step).rows_B)


# --- blocks of a cache


def test_blocks_are_neighbouring_shards_that_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_cache(tmp_path, 60, shard_size=3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(folder) as server:
        cache = TokenCache.open(server.address)
    largest = max(shard.bytes for shard in cache.shards)
    monkeypatch.setattr(data.loading, "MEMORY", 8 * largest + 1)  # a block gets half of it
    rows = [row for row in range(60) if row % 7]
    blocks_N = blocks_of(cache, rows)
    assert blocks_N is not None
    assert len(blocks_N) == len(rows)
    assert runs(blocks_N) == list(range(blocks_N.max() + 1)), "block numbers are consecutive"
    assert 4 <= blocks_N.max() <= 6
    for block in range(blocks_N.max() + 1):
        shards = {int(cache.clips.shard_N[row]) for row, other in zip(rows, blocks_N, strict=True) if other == block}
        assert shards == set(range(min(shards), max(shards) + 1))
        assert len(shards) <= 5


def test_shard_larger_than_the_memory_is_a_block_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(make_cache(tmp_path, 12, shard_size=3)) as server:
        cache = TokenCache.open(server.address)
    monkeypatch.setattr(data.loading, "MEMORY", 1)
    blocks_N = blocks_of(cache, range(12))
    assert blocks_N is not None
    assert blocks_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_cache_in_a_folder_has_no_blocks(cache: TokenCache) -> None:
    assert blocks_of(cache, range(10)) is None
