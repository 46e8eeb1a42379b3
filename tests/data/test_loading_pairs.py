"""Pairs for contrastive training: two different views of one video, reproducible from the seed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import TokenCache
from data.loading import BatchPlan, TokenDataset, batches
from tests.helpers.caches import make_cache


@pytest.fixture(scope="module")
def four_views(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("caches"), 9, views=4))


def view_of(cache: TokenCache, row: int, codes_thw: np.ndarray) -> int:
    """Return the number of the view that has these codes."""
    (view,) = [v for v, expected in enumerate(cache.codes(row)) if np.array_equal(codes_thw, expected)]
    return view


@pytest.mark.parametrize("views", [2, 3, 4])
def test_pair_is_another_view_of_the_same_video_and_all_pairs_are_drawn(tmp_path: Path, views: int) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 9, views=views))
    rows = [0, 2, 3, 8]
    dataset = TokenDataset(cache, rows, BatchPlan(samples=4, batch_size=4, seed=0), pairs=True)
    drawn: Counter[tuple[int, int]] = Counter()
    for step in range(200):
        batch = dataset[step]
        assert batch["pair_BTHW"].shape == batch["codes_BTHW"].shape
        for row, codes, pair in zip(batch["row_B"], batch["codes_BTHW"], batch["pair_BTHW"], strict=True):
            drawn[view_of(cache, row, codes), view_of(cache, row, pair)] += 1
    assert set(drawn) == {(a, b) for a in range(views) for b in range(views) if a != b}
    expected = 800 / len(drawn)
    assert all(0.6 * expected < count < 1.4 * expected for count in drawn.values())


def test_pairs_do_not_change_samples_and_their_views(four_views: TokenCache) -> None:
    plan = BatchPlan(samples=9, batch_size=6, seed=3)
    single, pairs = (TokenDataset(four_views, range(9), plan, pairs=pairs) for pairs in (False, True))
    for step in range(6):
        assert "pair_BTHW" not in single[step]
        for key, value in single[step].items():
            assert np.array_equal(value, pairs[step][key])


def test_pairs_do_not_depend_on_ranks_and_workers(four_views: TokenCache) -> None:
    dataset = TokenDataset(four_views, range(9), BatchPlan(samples=9, batch_size=4, seed=1), pairs=True)
    for world, workers in ((1, 2), (2, 0), (4, 0)):
        plans = [BatchPlan(samples=9, batch_size=4, seed=1, rank=rank, world=world) for rank in range(world)]
        ranks = [batches(TokenDataset(four_views, range(9), plan, pairs=True), range(5), workers) for plan in plans]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            pair_BTHW = torch.cat([part["pair_BTHW"] for part in parts])
            assert pair_BTHW.dtype == torch.int64
            assert np.array_equal(pair_BTHW.numpy(), dataset[step]["pair_BTHW"])


def test_pairs_of_dense_views_are_from_one_video(tmp_path: Path) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 12, views="dense"))
    rows = np.flatnonzero(cache.views_N > 1).tolist()
    assert 3 < len(rows) < 12
    assert len(set(cache.views_N[rows])) > 1
    dataset = TokenDataset(cache, rows, BatchPlan(samples=len(rows), batch_size=len(rows), seed=0), pairs=True)
    for step in range(30):
        batch = dataset[step]
        for row, codes, pair in zip(batch["row_B"], batch["codes_BTHW"], batch["pair_BTHW"], strict=True):
            assert view_of(cache, row, codes) != view_of(cache, row, pair)


@pytest.mark.parametrize("views", [1, "dense"])
def test_pairs_of_a_video_with_one_view_are_refused(tmp_path: Path, views: int) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 12, views=views))
    assert cache.views_N.min() == 1
    with pytest.raises(ValueError, match=r"two views.*--clip\.views 2"):
        TokenDataset(cache, range(12), BatchPlan(samples=12, batch_size=4, seed=0), pairs=True)
