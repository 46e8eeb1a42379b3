"""ARVideo predicts each cluster from the clusters before it and from nothing else, a sample at a time, as configured; what is
saved is what is loaded; a short training run gives the losses that it always gave."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ar_model.attention import set_backend
from ar_model.inputs import CodeSpec, patch_codes
from ar_model.objectives import ARVideo

Grid = tuple[int, int, int]


def spec(shape: Grid = (2, 4, 4), geometry: str = "digits") -> CodeSpec:
    """64 codes, so that every code of a small clip can be a different one."""
    if geometry == "digits":
        return CodeSpec(shape=shape, vocab_size=64, levels=(8, 8))
    if geometry == "codebook":
        vectors = torch.randn(64, 5, generator=torch.Generator().manual_seed(9))
        return CodeSpec(shape=shape, vocab_size=64, codebook_VC=vectors)
    return CodeSpec(shape=shape, vocab_size=64)


def build(codes: CodeSpec | None = None, **changes: Any) -> ARVideo:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "clusters": (1, 2, 2),
        "width": 12,
        "depth": 2,
        "heads": 2,
        "decoder_width": 16,
        "decoder_depth": 2,
        "decoder_heads": 2,
    }
    return ARVideo(spec() if codes is None else codes, **{**small, **changes})


def distinct_codes(samples: int, shape: Grid) -> dict[str, Tensor]:
    """Code number i at place i of every sample: a code tells which place it comes from."""
    codes = torch.arange(math.prod(shape)).view(shape).expand(samples, *shape).clone()
    return {"codes_BTHW": codes, "seed_B": torch.arange(samples) * 7919 + 3}


def random_batch(samples: int, shape: Grid = (2, 4, 4), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "codes_BTHW": torch.randint(0, 64, (samples, *shape), generator=generator),
        "seed_B": torch.randint(0, 2**62, (samples,), generator=generator),
    }


class Traced(NamedTuple):
    """What passed through the module in one forward pass."""

    seen_BSP: Tensor
    """Codes that entered the encoder."""
    layers: list[Tensor]
    """Output of every encoder block, (B, S, D)."""
    hidden_BMD: Tensor
    """Output of the decoder: what a prediction is made of."""
    wanted_BMP: Tensor
    """Codes that are predicted."""
    nats_BMP: Tensor
    loss: Tensor


@torch.no_grad()
def trace(model: ARVideo, batch: dict[str, Tensor]) -> Traced:
    caught: dict[str, Any] = {}
    hooks = [
        model.embedding.register_forward_hook(lambda m, args, out: caught.update(seen=args[0])),
        model.encoder.register_forward_hook(lambda m, args, out: caught.update(layers=out)),
        model.target.register_forward_hook(lambda m, args, out: caught.update(h=args[0], wanted=args[1], nats=out)),
    ]
    try:
        loss = model(batch)["loss"]
    finally:
        for hook in hooks:
            hook.remove()
    return Traced(caught["seen"], caught["layers"], caught["h"], caught["wanted"], caught["nats"], loss)


class Places(NamedTuple):
    """Which token stands where in a pass with distinct codes, read off the codes themselves."""

    token_of_code: Tensor
    cluster_of_token: Tensor
    seen_BS: Tensor
    wanted_BM: Tensor
    rank_BC: Tensor
    """Rank of every cluster in the order of every sample."""


def locate(model: ARVideo, traced: Traced, shape: Grid, patch: Grid, box: Grid) -> Places:
    """Find the tokens and the order again, from the definition of patches and boxes alone."""
    place = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, 3)
    grid = torch.tensor([n // p for n, p in zip(shape, patch, strict=True)])
    token_THW = place // torch.tensor(patch)
    counts = grid // torch.tensor(box)
    token_of_code = (token_THW[:, 0] * grid[1] + token_THW[:, 1]) * grid[2] + token_THW[:, 2]
    cluster_THW = token_THW // torch.tensor(box)
    cluster_of_code = (cluster_THW[:, 0] * counts[1] + cluster_THW[:, 1]) * counts[2] + cluster_THW[:, 2]
    cluster_of_token = torch.empty(int(grid.prod()), dtype=torch.long)
    cluster_of_token[token_of_code] = cluster_of_code
    seen_BS, wanted_BM = token_of_code[traced.seen_BSP[..., 0]], token_of_code[traced.wanted_BMP[..., 0]]
    n = int(counts.prod())
    seen_runs = cluster_of_token[seen_BS].unflatten(1, (n - 1, -1))
    wanted_runs = cluster_of_token[wanted_BM].unflatten(1, (n - 1, -1))
    assert (seen_runs == seen_runs[..., :1]).all() and (wanted_runs == wanted_runs[..., :1]).all()
    assert torch.equal(seen_runs[:, 1:, 0], wanted_runs[:, :-1, 0])  # run i of the queries is rank i + 1
    order_BN = torch.cat([seen_runs[:, :, 0], wanted_runs[:, -1:, 0]], dim=1)
    assert torch.equal(order_BN.sort(dim=1).values, torch.arange(n).expand(len(order_BN), n))
    return Places(token_of_code, cluster_of_token, seen_BS, wanted_BM, order_BN.argsort(dim=1))


LEAKS = [
    # codes, patch, clusters, further settings
    pytest.param((2, 4, 4), (1, 1, 1), (1, 2, 2), {}, id="boxes"),
    pytest.param((2, 4, 4), (1, 1, 1), (2, 2, 2), {"keep": 0.5, "targets": 0.5}, id="boxes through time"),
    pytest.param((2, 4, 4), (1, 1, 1), (1, 1, 1), {}, id="token by token"),
    pytest.param((4, 2, 4), (1, 1, 1), (1, 2, 4), {"keep": 0.4}, id="whole frames"),
    pytest.param((4, 3, 3), (1, 1, 1), (4, 1, 1), {"keep": 0.5, "rope": False}, id="columns"),
    pytest.param((4, 4, 4), (2, 1, 1), (1, 2, 2), {"keep": 0.5}, id="two codes a token"),
    pytest.param((2, 4, 4), (1, 1, 1), (1, 2, 2), {"keep": 1.0, "targets": 1.0}, id="nothing dropped"),
    pytest.param((2, 4, 4), (1, 1, 1), (1, 2, 4), {"order": "spatial-first", "keep": 0.5}, id="spatial-first"),
    pytest.param((2, 4, 4), (1, 1, 1), (1, 2, 2), {"order": "temporal-first", "keep": 0.5}, id="temporal-first"),
    pytest.param((2, 4, 4), (1, 1, 1), (1, 2, 2), {"likelihood": "digits", "code_input": "rows"}, id="digits and rows"),
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("shape, patch, box, settings", LEAKS)
def test_a_token_changes_nothing_that_comes_before_it_or_with_it(
    shape: Grid, patch: Grid, box: Grid, settings: dict[str, Any], backend: str, training: bool
) -> None:
    """Sample b has code b changed; both passes have equal shapes, so that whatever must not change is equal bit by bit."""
    model = build(spec(shape), code_patch=patch, clusters=box, **settings).train(training)
    set_backend(model, backend)
    n_codes = math.prod(shape)
    batch = distinct_codes(n_codes, shape)
    before = trace(model, batch)
    where = locate(model, before, shape, patch, box)
    everyone = torch.arange(n_codes)
    changed = batch["codes_BTHW"].flatten(1).clone()
    changed[everyone, everyone] = (changed[everyone, everyone] + 1 + everyone % 5) % 64
    after = trace(model, {**batch, "codes_BTHW": changed.view(-1, *shape)})

    mine_B = where.token_of_code[everyone]
    rank_B = where.rank_BC[everyone, where.cluster_of_token[mine_B]]
    seen_rank_BS = where.rank_BC.gather(1, where.cluster_of_token[where.seen_BS])
    wanted_rank_BM = where.rank_BC.gather(1, where.cluster_of_token[where.wanted_BM])
    kept_B = (where.seen_BS == mine_B[:, None]).any(1)
    assert kept_B.any()

    may_B = kept_B[:, None] & (seen_rank_BS >= rank_B[:, None])
    for old, new in zip(before.layers, after.layers, strict=True):
        moved_BS = (old != new).any(-1)
        assert not (moved_BS & ~may_B).any(), "an earlier rank of the encoder saw the token"
        assert torch.equal(moved_BS.any(1), kept_B)

    moved_BM = (before.hidden_BMD != after.hidden_BMD).any(-1)
    may_BM = kept_B[:, None] & (wanted_rank_BM > rank_B[:, None])
    assert not (moved_BM & ~may_BM).any(), "the prediction of a cluster saw the cluster or a later one"
    assert (moved_BM == may_BM).float().mean() > 0.99  # and what may see the token does

    itself_BM = where.wanted_BM == mine_B[:, None]
    moved_BM = (before.nats_BMP != after.nats_BMP).any(-1)
    assert not (moved_BM & ~may_BM & ~itself_BM).any()
    assert moved_BM[itself_BM].all()


@pytest.mark.parametrize("order", ["random", "spatial-first", "temporal-first"])
@pytest.mark.parametrize("box", [(1, 2, 2), (1, 1, 1), (2, 1, 2), (1, 4, 4)])
def test_the_last_cluster_is_never_seen_and_the_first_is_never_predicted(box: Grid, order: str) -> None:
    model = build(clusters=box, order=order, keep=0.5).eval()
    traced = trace(model, distinct_codes(40, (2, 4, 4)))
    where = locate(model, traced, (2, 4, 4), (1, 1, 1), box)
    last = where.rank_BC.shape[1] - 1
    assert last == 32 // math.prod(box) - 1
    assert set(where.rank_BC.gather(1, where.cluster_of_token[where.seen_BS]).unique().tolist()) == set(range(last))
    assert set(where.rank_BC.gather(1, where.cluster_of_token[where.wanted_BM]).unique().tolist()) == set(
        range(1, last + 1)
    )


@pytest.mark.parametrize("keep, kept", [(0.25, 2), (0.5, 4), (0.3, 3), (0.01, 1), (1.0, 8)])
def test_the_encoder_gets_the_share_keep_of_each_cluster_but_the_last(keep: float, kept: int) -> None:
    model = build(clusters=(2, 2, 2), keep=keep)
    traced = trace(model, distinct_codes(5, (2, 4, 4)))
    where = locate(model, traced, (2, 4, 4), (1, 1, 1), (2, 2, 2))
    assert where.seen_BS.shape == (5, 3 * kept)
    assert all(len(set(row)) == len(row) for row in where.seen_BS.tolist())
    assert len({tuple(sorted(row)) for row in where.seen_BS.tolist()}) > 1 or keep == 1.0


@pytest.mark.parametrize("share, tokens", [(0.28, 7), (0.56, 14), (0.2, 5)])
def test_shares_that_come_out_even_are_not_rounded_up(share: float, tokens: int) -> None:
    """0.28 * 25 is 7.000000000000001 in floating point; it means 7 tokens."""
    model = build(spec((2, 5, 5)), clusters=(1, 5, 5), keep=share, targets=share)
    traced = trace(model, random_batch(1, (2, 5, 5)))
    assert traced.seen_BSP.shape[1] == tokens
    assert traced.wanted_BMP.shape[1] == tokens


@pytest.mark.parametrize("targets, trained_on", [(1.0, 8), (0.5, 4), (0.25, 2), (0.1, 1)])
def test_training_predicts_a_share_of_each_next_cluster_and_evaluation_all_of_it(
    targets: float, trained_on: int
) -> None:
    model = build(clusters=(2, 2, 2), targets=targets)
    batch = distinct_codes(4, (2, 4, 4))
    for training, count in [(True, trained_on), (False, 8)]:
        traced = trace(model.train(training), batch)
        where = locate(model, traced, (2, 4, 4), (1, 1, 1), (2, 2, 2))
        assert where.wanted_BM.shape == (4, 3 * count)
        assert all(len(set(row)) == len(row) for row in where.wanted_BM.tolist())


def test_tokens_to_train_on_are_drawn_evenly() -> None:
    model = build(clusters=(1, 2, 2), targets=0.25).train()
    wanted = trace(model, distinct_codes(1500, (2, 4, 4))).wanted_BMP
    counts = torch.bincount(wanted.flatten(), minlength=32)
    expected = 1500 * 7 / 32
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("training, targets, count", [(True, 0.25, 2), (True, 1.0, 5), (False, 0.25, 5)])
def test_without_the_causal_mask_only_dropped_tokens_are_predicted_and_everything_kept_is_seen(
    training: bool, targets: float, count: int
) -> None:
    shape, box = (2, 4, 4), (2, 2, 2)
    model = build(clusters=box, causal=False, keep=0.3, targets=targets).train(training)
    batch = distinct_codes(32, shape)
    before = trace(model, batch)
    where = locate(model, before, shape, (1, 1, 1), box)
    assert where.wanted_BM.shape[1] == 3 * count
    assert not (where.seen_BS[:, :, None] == where.wanted_BM[:, None, :]).any()
    changed = batch["codes_BTHW"].flatten(1).clone()
    changed[torch.arange(32), torch.arange(32)] += 17
    after = trace(model, {**batch, "codes_BTHW": changed.view(-1, *shape)})
    kept_B = (where.seen_BS == torch.arange(32)[:, None]).any(1)
    moved_BM = (before.hidden_BMD != after.hidden_BMD).any(-1)
    assert torch.equal(moved_BM, kept_B[:, None].expand_as(moved_BM))


@pytest.mark.parametrize("likelihood", ["joint", "digits"])
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_a_samples_loss_does_not_depend_on_its_batch(likelihood: str, backend: str) -> None:
    model = build(likelihood=likelihood).train()
    set_backend(model, backend)
    one, other = random_batch(5, seed=1), random_batch(5, seed=2)
    mixed = {key: torch.cat([one[key][:2], other[key][2:]]) for key in one}
    assert torch.equal(trace(model, one).nats_BMP[:2], trace(model, mixed).nats_BMP[:2])
    alone = trace(model, {key: value[:1] for key, value in one.items()})
    assert torch.allclose(alone.nats_BMP[0], trace(model, one).nats_BMP[0], atol=1e-5)


def test_the_loss_is_the_mean_of_all_nats_and_also_told_in_bits() -> None:
    model = build(spec((4, 4, 4)), code_patch=(2, 1, 1)).eval()
    batch = random_batch(3, (4, 4, 4))
    out, traced = model(batch), trace(model, batch)
    assert traced.nats_BMP.shape == (3, 7 * 4, 2)
    assert out["loss"].requires_grad and not out["bits_per_code"].requires_grad
    assert out["loss"].shape == out["bits_per_code"].shape == ()
    assert out["loss"].item() == pytest.approx(traced.nats_BMP.mean().item())
    assert out["bits_per_code"].item() == pytest.approx(out["loss"].item() / math.log(2))


@pytest.mark.parametrize("geometry", ["digits", "codebook", "none"])
@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 1, 1)])
def test_the_loss_of_a_new_model_is_about_that_of_guessing(geometry: str, patch: Grid) -> None:
    shape = (4, 4, 4)
    for likelihood in ["joint", "digits"] if geometry == "digits" else ["joint"]:
        wide = {"width": 48, "decoder_width": 48, "code_patch": patch, "likelihood": likelihood}
        model = build(spec(shape, geometry), **wide).eval()
        assert model(random_batch(16, shape))["loss"].item() == pytest.approx(math.log(64), rel=0.15)


def test_features_are_one_per_layer_of_whole_clips_in_raster_order() -> None:
    shape, patch = (4, 4, 4), (2, 1, 1)
    model = build(spec(shape), code_patch=patch, depth=3, clusters=(2, 2, 2)).eval()
    batch = random_batch(2, shape)
    entered: list[Tensor] = []
    hook = model.encoder.blocks[0].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    layers = model.features(batch)
    hook.remove()
    assert model.time_slices == 2
    assert [tuple(layer.shape) for layer in layers] == [(2, 32, 12)] * 3
    tokens = patch_codes(batch["codes_BTHW"], patch)
    for token in range(32):
        own = model.embedding(tokens[:, token : token + 1])[:, 0] + model.position_LD[token]
        assert torch.allclose(entered[0][:, token], own, atol=1e-6)


def test_features_see_the_whole_clip_and_draw_nothing() -> None:
    model = build().train()
    batch = distinct_codes(32, (2, 4, 4))
    changed = batch["codes_BTHW"].flatten(1).clone()
    changed[torch.arange(32), torch.arange(32)] += 11
    before = model.features(batch)
    assert all(
        torch.equal(a, b) for a, b in zip(before, model.features({**batch, "seed_B": batch["seed_B"] + 1}), strict=True)
    )
    after = model.features({**batch, "codes_BTHW": changed.view(-1, 2, 4, 4)})
    assert ((before[-1] != after[-1]).any(-1)).all()


def test_features_do_not_depend_on_the_other_clips() -> None:
    model = build().eval()
    one, other = random_batch(4, seed=1), random_batch(4, seed=2)
    mixed = {key: torch.cat([one[key][:1], other[key][1:]]) for key in one}
    assert torch.equal(model.features(one)[-1][0], model.features(mixed)[-1][0])


def test_with_and_without_rope_positions_count() -> None:
    for rope in (True, False):
        model = build(rope=rope).eval()
        batch = random_batch(1)
        flipped = {**batch, "codes_BTHW": batch["codes_BTHW"].flip(1)}
        there, back = model.features(batch)[-1], model.features(flipped)[-1].view(1, 2, 16, 12).flip(1).flatten(1, 2)
        assert not torch.allclose(there, back, atol=1e-3)


def test_code_input_rows_gives_every_code_its_own_vector_and_geometry_shares_them() -> None:
    codes = torch.arange(64).view(1, 64, 1)
    for code_input, rank in [("geometry", 15), ("rows", 64)]:
        model = build(code_input=code_input, width=96, heads=2)
        vectors = model.embedding(codes)[0]
        assert torch.linalg.matrix_rank(vectors) == rank  # 8 + 8 digits, one of them redundant


def test_a_codebook_enters_by_its_vectors() -> None:
    codes = torch.arange(64).view(1, 64, 1)
    by_geometry, by_rows = (
        build(spec(geometry="codebook"), width=96, heads=2, code_input=code_input)
        for code_input in ("geometry", "rows")
    )
    assert torch.linalg.matrix_rank(by_geometry.embedding(codes)[0]) == 5  # channels of the codebook
    assert torch.linalg.matrix_rank(by_rows.embedding(codes)[0]) == 64
    assert by_geometry(random_batch(2))["loss"].isfinite()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"keep": 0.0}, "keep .*0.0"),
        ({"keep": 1.5}, "keep .*1.5"),
        ({"keep": math.nan}, "keep .*nan"),
        ({"targets": -0.1}, "targets .*-0.1"),
        ({"targets": 2}, "targets .*2"),
        ({"clusters": (1, 3, 2)}, "1x3x2.*2x4x4"),
        ({"clusters": (2, 4, 4)}, "nothing is left to predict"),
        ({"code_patch": (1, 3, 1)}, "code_patch"),
        ({"code_patch": (2, 1, 1), "clusters": (2, 2, 2)}, "2x2x2.*1x4x4"),
        ({"heads": 5}, "width 12.*5 heads"),
        ({"decoder_heads": 16}, "width 16.*16 heads"),
        ({"causal": False, "keep": 1.0}, "causal"),
        ({"causal": False, "clusters": (1, 1, 1)}, "causal"),
        ({"codes": spec(geometry="codebook"), "likelihood": "digits"}, "digits"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(**changes)


@pytest.mark.parametrize(
    "changes", [{"order": "raster"}, {"code_input": "pixels"}, {"likelihood": "both"}, {"depth": 0}, {"heads": 0}]
)
def test_a_misspelt_choice_or_an_empty_network_is_refused_instead_of_becoming_something_else(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(ValueError):
        build(**changes)
