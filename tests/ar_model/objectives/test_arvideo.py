"""ARVideo predicts clusters of codes or pixels, a sample at a time, as configured; settings that cannot work are refused."""

import math
from typing import Any

import pytest
import torch

from ar_model.attention import set_backend
from ar_model.inputs import CodeSpec
from tests.helpers.small_arvideo import Grid, build, distinct_batch, locate, random_batch, spec, trace, train


@pytest.mark.parametrize("order", ["random", "spatial-first", "temporal-first"])
@pytest.mark.parametrize("box", [(1, 2, 2), (1, 1, 1), (2, 1, 2), (1, 4, 4)])
def test_the_last_cluster_is_never_seen_and_the_first_is_never_predicted(box: Grid, order: str) -> None:
    model = build(clusters=box, order=order, keep=0.5).eval()
    traced = trace(model, distinct_batch(40, (2, 4, 4)))
    where = locate(traced, (2, 4, 4), (1, 1, 1), box)
    last = where.rank_BC.shape[1] - 1
    assert last == 32 // math.prod(box) - 1
    assert set(where.rank_BC.gather(1, where.cluster_of_token[where.seen_BS]).unique().tolist()) == set(range(last))
    assert set(where.rank_BC.gather(1, where.cluster_of_token[where.wanted_BM]).unique().tolist()) == set(
        range(1, last + 1)
    )


@pytest.mark.parametrize("keep, kept", [(0.25, 2), (0.5, 4), (0.3, 3), (0.01, 1), (1.0, 8)])
def test_the_encoder_gets_the_share_keep_of_each_cluster_but_the_last(keep: float, kept: int) -> None:
    model = build(clusters=(2, 2, 2), keep=keep)
    traced = trace(model, distinct_batch(5, (2, 4, 4)))
    where = locate(traced, (2, 4, 4), (1, 1, 1), (2, 2, 2))
    assert where.seen_BS.shape == (5, 3 * kept)
    assert all(len(set(row)) == len(row) for row in where.seen_BS.tolist())
    assert len({tuple(sorted(row)) for row in where.seen_BS.tolist()}) > 1 or keep == 1.0


@pytest.mark.parametrize("share, tokens", [(0.28, 7), (0.56, 14), (0.2, 5)])
def test_shares_that_come_out_even_are_not_rounded_up(share: float, tokens: int) -> None:
    """0.28 * 25 is 7.000000000000001 in floating point; it means 7 tokens."""
    model = build(spec((2, 5, 5)), clusters=(1, 5, 5), keep=share, targets=share)
    traced = trace(model, random_batch(1, (2, 5, 5)))
    assert traced.seen.shape[1] == tokens
    assert traced.wanted.shape[1] == tokens


@pytest.mark.parametrize("targets, trained_on", [(1.0, 8), (0.5, 4), (0.25, 2), (0.1, 1)])
def test_training_predicts_a_share_of_each_next_cluster_and_evaluation_all_of_it(
    targets: float, trained_on: int
) -> None:
    model = build(clusters=(2, 2, 2), targets=targets)
    batch = distinct_batch(4, (2, 4, 4))
    for training, count in [(True, trained_on), (False, 8)]:
        traced = trace(model.train(training), batch)
        where = locate(traced, (2, 4, 4), (1, 1, 1), (2, 2, 2))
        assert where.wanted_BM.shape == (4, 3 * count)
        assert all(len(set(row)) == len(row) for row in where.wanted_BM.tolist())


def test_tokens_to_train_on_are_drawn_evenly() -> None:
    model = build(clusters=(1, 2, 2), targets=0.25).train()
    wanted = trace(model, distinct_batch(1500, (2, 4, 4))).wanted
    counts = torch.bincount(wanted.flatten(), minlength=32)
    expected = 1500 * 7 / 32
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    "settings", [{"likelihood": "joint"}, {"likelihood": "digits"}, {"target": "pixels"}, {"ranks": 0.5}]
)
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_a_samples_loss_does_not_depend_on_its_batch(settings: dict[str, Any], backend: str) -> None:
    model = build(**settings).train()
    set_backend(model, backend)
    one, other = random_batch(5, seed=1), random_batch(5, seed=2)
    mixed = {key: torch.cat([one[key][:2], other[key][2:]]) for key in one}
    assert torch.equal(trace(model, one).costs_BMP[:2], trace(model, mixed).costs_BMP[:2])
    alone = [trace(model, {key: value[i : i + 1] for key, value in one.items()}) for i in range(5)]
    assert torch.allclose(alone[0].costs_BMP[0], trace(model, one).costs_BMP[0], atol=1e-5)
    assert sum(x.loss for x in alone) / 5 == pytest.approx(model(one)["loss"].item(), rel=1e-5)


def test_the_loss_is_the_mean_of_all_nats_and_also_told_in_bits() -> None:
    model = build(spec((4, 4, 4)), code_patch=(2, 1, 1)).eval()
    batch = random_batch(3, (4, 4, 4))
    out, traced = model(batch), trace(model, batch)
    assert traced.costs_BMP.shape == (3, 7 * 4, 2)
    assert out["loss"].requires_grad and not out["bits_per_code"].requires_grad
    assert out["loss"].shape == out["bits_per_code"].shape == ()
    assert out["loss"].item() == pytest.approx(traced.costs_BMP.mean().item())
    assert out["bits_per_code"].item() == pytest.approx(out["loss"].item() / math.log(2))


def test_an_error_of_pixels_is_not_told_in_bits() -> None:
    model = build(target="pixels").eval()
    batch = random_batch(3)
    out, traced = model(batch), trace(model, batch)
    assert set(out) == {"loss"} and out["loss"].requires_grad
    assert traced.costs_BMP.shape == (3, 7 * 4, 8 * 3)
    assert out["loss"].item() == pytest.approx(traced.costs_BMP.mean().item())


@pytest.mark.parametrize("input", ["codes", "pixels"])
@pytest.mark.parametrize("target", ["codes", "pixels"])
def test_batches_need_pixels_only_where_pixels_are_configured(input: str, target: str) -> None:  # noqa: A002
    model = build(input=input, target=target)
    batch = random_batch(2)
    assert model.needs_pixels == ("pixels" in (input, target))
    if not model.needs_pixels:
        del batch["pixels_BTHWC"]
    assert model(batch)["loss"].isfinite()


@pytest.mark.parametrize("input, target", [("pixels", "pixels"), ("codes", "pixels"), ("pixels", "codes")])
def test_the_loss_falls_when_one_batch_is_learned_by_heart(input: str, target: str) -> None:  # noqa: A002
    model = build(width=24, decoder_width=24, input=input, target=target, targets=1.0).train()
    losses = train(model, [random_batch(2)] * 80)
    guessing = math.log(64) if target == "codes" else 7 / 8  # of 8 pixels, whose unbiased variance is 1
    assert losses[0] > 0.9 * guessing
    assert losses[-1] < 0.65 * guessing


@pytest.mark.parametrize("geometry", ["digits", "codebook", "none"])
@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 1, 1)])
def test_the_loss_of_a_new_model_is_about_that_of_guessing(geometry: str, patch: Grid) -> None:
    shape = (4, 4, 4)
    for likelihood in ["joint", "digits"] if geometry == "digits" else ["joint"]:
        wide = {"width": 48, "decoder_width": 48, "code_patch": patch, "likelihood": likelihood}
        model = build(spec(shape, geometry), **wide).eval()
        assert model(random_batch(16, shape))["loss"].item() == pytest.approx(math.log(64), rel=0.15)


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


SHARES = ["keep", "targets", "ranks"]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("value", [0.0, 0, -0.1, -1, 1.5, 2, 1.0000001, math.nan, math.inf, -math.inf])
def test_a_share_outside_of_0_to_1_is_refused_by_name(share: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"objective.{share} is {value}"):
        build(**{share: value})


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("value", [1, 1.0, 1e-6])
def test_a_share_of_all_or_of_nearly_nothing_is_one(share: str, value: float) -> None:
    model = build(**{share: value}).train()
    assert model(random_batch(2))["loss"].isfinite()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"clusters": (1, 3, 2)}, "clusters .*1x3x2.*2x4x4"),
        ({"clusters": (0, 2, 2)}, "clusters .*0x2x2"),
        ({"clusters": (2, 4, 4)}, "nothing is left to predict"),
        ({"code_patch": (1, 3, 1)}, "code_patch"),
        ({"code_patch": (0, 1, 1)}, "code_patch"),
        ({"code_patch": (2, 1, 1), "clusters": (2, 2, 2)}, "clusters .*2x2x2.*1x4x4"),
        ({"heads": 5}, "width 12.*5 heads"),
        ({"heads": 0}, "width 12.* 0 heads"),
        ({"decoder_heads": 16}, "width 16.*16 heads"),
        ({"depth": 0}, "depth"),
        ({"decoder_depth": -1}, "decoder_depth"),
        ({"width": 0}, "width"),
        ({"causal": False, "keep": 1.0}, "causal.* keep"),
        ({"causal": False, "clusters": (1, 1, 1)}, "causal"),
        ({"codes": spec(geometry="codebook"), "likelihood": "digits"}, "likelihood digits"),
        ({"codes": CodeSpec(shape=(2, 4, 4), vocab_size=64), "input": "pixels"}, "keep_pixels"),
        ({"codes": CodeSpec(shape=(2, 4, 4), vocab_size=64), "target": "pixels"}, "keep_pixels"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(**changes)


@pytest.mark.parametrize("others", [{}, {"input": "pixels", "target": "pixels"}], ids=["codes", "pixels"])
@pytest.mark.parametrize("name", ["order", "input", "target", "code_input", "likelihood"])
def test_a_misspelt_choice_is_refused_by_name_instead_of_becoming_something_else(
    name: str, others: dict[str, Any]
) -> None:
    """Also where the choice would play no part."""
    with pytest.raises(ValueError, match=f"{name}.* 'rasta'"):
        build(**{**others, name: "rasta"})
