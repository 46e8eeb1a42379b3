"""With `ranks` below 1, a training step uses randomly chosen clusters in the configured order. Evaluation uses all."""

import math

import pytest
import torch
from torch import Tensor

from ar_model.clusters import ClusterGrid, Order, choose_clusters, cluster_order, tokens_by_rank
from tests.helpers.small_arvideo import Grid, build, distinct_batch, locate, random_batch, spec, trace

ORDERS: list[Order] = ["random", "spatial-first", "temporal-first"]
CLUSTERS = ClusterGrid((2, 4, 4), (1, 2, 2))
SEEDS = torch.tensor([0, 1, 2, -1, -7, 12345678901234567, 2**63 - 1, -(2**63)])


def chosen(order: Order, count: int, seed_B: Tensor) -> Tensor:
    return choose_clusters(cluster_order(CLUSTERS, order, seed_B), count, seed_B)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("box, clusters", [((1, 2, 2), 8), ((1, 1, 1), 32), ((2, 4, 2), 2), ((2, 2, 2), 4)])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.6, 0.99, 1.0])
def test_a_step_has_the_share_of_predicted_clusters_and_one_before_them(
    share: float, box: Grid, clusters: int, order: Order
) -> None:
    """`locate` asserts that clusters are distinct and that visible clusters are one rank ahead of predicted ones."""
    model = build(ranks=share, clusters=box, order=order, keep=0.5, targets=0.5)
    batch = distinct_batch(6, (2, 4, 4))
    ranks = math.ceil(round(share * (clusters - 1), 6))
    tokens = math.ceil(math.prod(box) / 2)
    traced = trace(model.train(), batch)
    assert traced.visible.shape[1] == traced.predicted.shape[1] == ranks * tokens
    places = locate(traced, (2, 4, 4), (1, 1, 1), box, ranks)
    assert [(row < clusters).sum() for row in places.rank_BC] == [ranks + 1] * 6
    traced = trace(model.eval(), batch)
    assert traced.visible.shape[1] == (clusters - 1) * tokens
    places = locate(traced, (2, 4, 4), (1, 1, 1), box, clusters - 1)
    assert (places.rank_BC < clusters).all()


@pytest.mark.parametrize("order", ORDERS)
def test_all_clusters_take_part_in_a_model_equally_often(order: Order) -> None:
    model, samples = build(ranks=0.3, order=order, width=4, heads=1, decoder_width=4, decoder_heads=1).train(), 1600
    places = locate(trace(model, distinct_batch(samples, (2, 4, 4))), (2, 4, 4), (1, 1, 1), (1, 2, 2), ranks=3)
    takes_part_BC = places.rank_BC < 8
    assert (takes_part_BC.sum(0) - samples / 2).abs().max() < 5 * math.sqrt(samples / 4)
    assert len(takes_part_BC.unique(dim=0)) == math.comb(8, 4)  # each sample has its own choice


def test_floating_point_errors_do_not_round_the_share_of_ranks_up() -> None:
    """0.28 * 25 is 7.000000000000001 in floating point, but must give 7 clusters."""
    model = build(spec((26, 1, 1)), clusters=(1, 1, 1), ranks=0.28)
    assert trace(model, random_batch(1, (26, 1, 1))).predicted.shape[1] == 7


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
def test_chosen_clusters_keep_a_fixed_order(order: Order) -> None:
    full = cluster_order(CLUSTERS, order, SEEDS[:1])[0].tolist()
    rows = chosen(order, 4, torch.arange(1000)).tolist()
    assert all([full.index(c) for c in row] == sorted(full.index(c) for c in row) for row in rows)
    assert len({tuple(row) for row in rows}) == math.comb(8, 4)  # every choice occurs


def test_chosen_clusters_keep_a_random_order() -> None:
    seeds = torch.arange(200)
    order = cluster_order(CLUSTERS, "random", seeds)
    for full, row in zip(order.tolist(), choose_clusters(order, 5, seeds).tolist(), strict=True):
        assert [c for c in full if c in row] == row


@pytest.mark.parametrize("order", ORDERS)
def test_every_cluster_takes_part_equally_often(order: Order) -> None:
    samples, count = 4000, 3
    counts = torch.bincount(chosen(order, count, 17 * torch.arange(samples)).flatten(), minlength=8)
    share = count / 8
    assert (counts - samples * share).abs().max() < 5 * math.sqrt(samples * share * (1 - share))


def test_the_choice_is_independent_of_the_order() -> None:
    """All arrangements of 2 of 4 clusters are equally likely."""
    clusters, seeds = ClusterGrid((1, 4, 4), (1, 2, 2)), torch.arange(12000)
    rows = choose_clusters(cluster_order(clusters, "random", seeds), 2, seeds)
    counts = torch.bincount(rows[:, 0] * 4 + rows[:, 1], minlength=16).view(4, 4)
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    assert counts.diagonal().sum() == 0
    assert (off_diagonal - 1000).abs().max() < 5 * math.sqrt(1000)
    positions = choose_clusters(torch.arange(4).expand(12000, 4), 2, seeds)
    first = cluster_order(clusters, "random", seeds)[:, 0]
    joint = torch.bincount(positions[:, 0] * 4 + first, minlength=12).view(-1, 4)[:3] / 12000
    product = joint.sum(1, keepdim=True) * joint.sum(0)
    assert (joint - product).abs().max() < 5 * math.sqrt(0.125 / 12000)


def test_the_choice_depends_on_the_samples_own_seed_only() -> None:
    rows = chosen("random", 3, SEEDS)
    torch.manual_seed(3)
    for batch in [SEEDS.flip(0), SEEDS[3:5], SEEDS[[2, 2, 6]]]:
        torch.rand(5)  # the global generator has no effect
        for row, seed in zip(chosen("random", 3, batch), batch.tolist(), strict=True):
            assert torch.equal(row, rows[SEEDS.tolist().index(seed)])
    state = torch.get_rng_state()
    chosen("random", 3, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)


def test_choosing_all_clusters_returns_the_order_itself() -> None:
    order = cluster_order(CLUSTERS, "random", SEEDS)
    assert torch.equal(choose_clusters(order, 8, SEEDS), order)


def test_chosen_clusters_have_all_their_tokens_shuffled() -> None:
    seeds, members = torch.arange(3000), CLUSTERS.members()
    order = chosen("random", 3, seeds)
    tokens = tokens_by_rank(members, order, seeds)
    assert torch.equal(tokens.sort(dim=2).values, members[order].sort(dim=2).values)
    counts = torch.bincount(tokens[:, :, 0].flatten(), minlength=32)
    expected = 3000 * 3 / 32
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_choices_of_known_seeds_never_change() -> None:
    assert chosen("spatial-first", 4, torch.tensor([0, 7])).tolist() == GOLDEN_CHOICE


GOLDEN_CHOICE = [[0, 2, 6, 7], [3, 5, 6, 7]]
