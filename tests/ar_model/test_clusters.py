"""Clusters partition the grid into boxes. Their order and the shuffle of their tokens are uniform and depend on the sample's
seed only. The random numbers are those of the published SplitMix64."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from ar_model.clusters import ClusterGrid, Order, cluster_order, hashed, tokens_by_rank

GRIDS = [
    ClusterGrid((4, 4, 6), (2, 2, 3)),
    ClusterGrid((2, 3, 4), (1, 1, 1)),
    ClusterGrid((3, 4, 4), (1, 4, 4)),
    ClusterGrid((4, 3, 2), (4, 1, 1)),
    ClusterGrid((5, 7, 3), (5, 7, 3)),
    ClusterGrid((1, 6, 4), (1, 3, 2)),
]
ORDERS: list[Order] = ["random", "spatial-first", "temporal-first"]
SEEDS = torch.tensor([0, 1, 2, -1, -7, 12345678901234567, 2**63 - 1, -(2**63)])
MASK64 = 2**64 - 1


def coordinates(clusters: ClusterGrid, tokens: Tensor) -> Tensor:
    """Return (t, h, w) of tokens numbered in raster order."""
    _, h, w = clusters.grid
    return torch.stack([tokens // (h * w), tokens // w % h, tokens % w], dim=-1)


def published_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def unsigned(x: Tensor) -> list[int]:
    return [int(v) & MASK64 for v in x.flatten()]


@pytest.mark.parametrize("clusters", GRIDS, ids=str)
def test_members_partition_the_grid(clusters: ClusterGrid) -> None:
    members = clusters.members()
    assert members.shape == (math.prod(clusters.counts), math.prod(clusters.box))
    assert sorted(members.flatten().tolist()) == list(range(math.prod(clusters.grid)))


@pytest.mark.parametrize("clusters", GRIDS, ids=str)
def test_every_cluster_is_a_box_and_clusters_come_in_raster_order(clusters: ClusterGrid) -> None:
    corners = []
    for row in clusters.members():
        tokens = coordinates(clusters, row)
        low, high = tokens.amin(0), tokens.amax(0)
        assert (high - low + 1).tolist() == list(clusters.box)
        assert (low % torch.tensor(clusters.box)).sum() == 0
        corners.append(tuple(low.tolist()))
    assert corners == sorted(corners)


@pytest.mark.parametrize("grid, box", [((4, 4, 4), (3, 2, 2)), ((4, 4, 4), (2, 2, 8)), ((4, 6, 8), (2, 4, 4))])
def test_a_box_that_does_not_divide_the_grid_is_refused_with_both_sizes(
    grid: tuple[int, int, int], box: tuple[int, int, int]
) -> None:
    with pytest.raises(ValueError) as error:
        ClusterGrid(grid, box)
    assert "x".join(map(str, grid)) in str(error.value) and "x".join(map(str, box)) in str(error.value)


@pytest.mark.parametrize("box", [(0, 2, 2), (2, -2, 2)])
def test_a_box_with_a_side_below_one_is_refused(box: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="x".join(map(str, box))):
        ClusterGrid((4, 4, 4), box)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("clusters", GRIDS, ids=str)
def test_orders_are_permutations_for_any_seed(clusters: ClusterGrid, order: Order) -> None:
    n = math.prod(clusters.counts)
    ranks = cluster_order(clusters, order, SEEDS)
    assert ranks.shape == (len(SEEDS), n)
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(n).expand(len(SEEDS), n))


def test_random_order_draws_every_permutation_equally_often() -> None:
    ranks = cluster_order(ClusterGrid((3, 2, 2), (1, 2, 2)), "random", torch.arange(6000))
    counts = Counter(tuple(row) for row in ranks.tolist())
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * math.sqrt(1000 * 5 / 6) for count in counts.values())


def test_random_order_puts_every_cluster_at_every_rank_equally_often() -> None:
    ranks = cluster_order(ClusterGrid((4, 4, 2), (2, 2, 1)), "random", 1000 + 3 * torch.arange(4000))
    counts = torch.stack([(ranks == cluster).sum(0) for cluster in range(8)])
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 49 + 5 * math.sqrt(2 * 49)


def test_random_orders_of_different_seeds_differ() -> None:
    ranks = cluster_order(ClusterGrid((4, 4, 4), (1, 2, 2)), "random", torch.arange(500))
    assert len({tuple(row) for row in ranks.tolist()}) == 500


def test_order_and_tokens_depend_on_the_samples_own_seed_only() -> None:
    clusters = ClusterGrid((4, 4, 4), (2, 2, 2))
    order = cluster_order(clusters, "random", SEEDS)
    tokens = tokens_by_rank(clusters.members(), order, SEEDS)
    torch.manual_seed(3)
    for batch in [SEEDS.flip(0), SEEDS[3:5], SEEDS[[2, 2, 6]]]:
        torch.rand(5)  # the global generator has no effect
        order_again = cluster_order(clusters, "random", batch)
        tokens_again = tokens_by_rank(clusters.members(), order_again, batch)
        for row, seed in enumerate(batch.tolist()):
            original = SEEDS.tolist().index(seed)
            assert torch.equal(order_again[row], order[original])
            assert torch.equal(tokens_again[row], tokens[original])


@pytest.mark.parametrize("order, axes", [("spatial-first", (0, 1, 2)), ("temporal-first", (1, 2, 0))])
@pytest.mark.parametrize("clusters", GRIDS, ids=str)
def test_fixed_orders_finish_a_time_slice_or_a_location_before_the_next(
    clusters: ClusterGrid, order: Order, axes: tuple[int, int, int]
) -> None:
    ranks = cluster_order(clusters, order, SEEDS)
    corners = coordinates(clusters, clusters.members()[ranks][:, :, 0])
    for sample in corners[..., axes].tolist():
        assert sample == sorted(sample)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("clusters", GRIDS, ids=str)
def test_tokens_by_rank_holds_all_tokens_of_each_ranks_cluster(clusters: ClusterGrid, order: Order) -> None:
    members = clusters.members()
    ranks = cluster_order(clusters, order, SEEDS)
    tokens = tokens_by_rank(members, ranks, SEEDS)
    assert torch.equal(tokens.sort(dim=2).values, members[ranks].sort(dim=2).values)


def test_a_slice_keeps_every_token_equally_often_at_every_rank() -> None:
    clusters, samples, kept = ClusterGrid((2, 4, 4), (2, 2, 2)), 4000, 2
    members, seeds = clusters.members(), torch.arange(samples)
    order = cluster_order(clusters, "random", seeds)
    tokens = tokens_by_rank(members, order, seeds)[:, :, :kept]
    counts = torch.bincount(tokens.flatten(), minlength=32)
    expected = samples * kept / 8
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected * (1 - kept / 8))
    for rank in range(4):
        counts = torch.bincount(tokens[:, rank].flatten(), minlength=32)
        assert (counts - expected / 4).abs().max() < 5 * math.sqrt(expected / 4)


def test_tokens_kept_in_two_clusters_are_drawn_independently() -> None:
    clusters, seeds = ClusterGrid((1, 4, 2), (1, 2, 2)), torch.arange(8000)
    order = cluster_order(clusters, "spatial-first", seeds)
    first = tokens_by_rank(clusters.members(), order, seeds)[:, :, 0]
    pairs = torch.bincount(first[:, 0] * 4 + first[:, 1] - 4, minlength=16)
    assert len(pairs) == 16
    assert (pairs - 500).abs().max() < 5 * math.sqrt(500)


def test_hashed_gives_the_published_splitmix64_sequence_from_state_zero() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert unsigned(hashed(torch.tensor([0]), 5, stream=0)) == published


@pytest.mark.parametrize("stream", [0, 1, 5])
def test_hashed_is_splitmix64_at_any_seed_stream_and_position(stream: int) -> None:
    values = hashed(SEEDS, 40, stream)
    assert values.dtype == torch.int64
    for seed, row in zip(SEEDS.tolist(), values, strict=True):
        state = published_mix(seed & MASK64)
        gamma = 0x9E3779B97F4A7C15
        assert unsigned(row) == [
            published_mix((state + (stream * 2**32 + i + 1) * gamma) & MASK64) for i in range(len(row))
        ]


def test_streams_and_seeds_share_no_values() -> None:
    values = torch.cat([hashed(torch.arange(50), 200, stream).flatten() for stream in (0, 1)])
    assert len(values.unique()) == values.numel()


def test_orders_of_known_seeds_never_change() -> None:
    clusters = ClusterGrid((2, 4, 4), (1, 2, 2))
    order = cluster_order(clusters, "random", torch.tensor([0, 7]))
    tokens = tokens_by_rank(clusters.members(), order, torch.tensor([0, 7]))
    assert order.tolist() == GOLDEN_ORDER
    assert tokens[:, 0].tolist() == GOLDEN_TOKENS


GOLDEN_ORDER = [[7, 0, 3, 2, 4, 6, 5, 1], [0, 7, 4, 3, 2, 1, 5, 6]]
GOLDEN_TOKENS = [[30, 27, 31, 26], [5, 1, 0, 4]]
