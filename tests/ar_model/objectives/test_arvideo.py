"""ARVideo predicts clusters of codes or pixels as configured, for each sample by itself. Invalid settings are refused."""

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
    places = locate(traced, (2, 4, 4), (1, 1, 1), box)
    last = places.rank_BC.shape[1] - 1
    assert last == 32 // math.prod(box) - 1
    assert set(places.rank_BC.gather(1, places.cluster_of_token[places.visible_BS]).unique().tolist()) == set(
        range(last)
    )
    assert set(places.rank_BC.gather(1, places.cluster_of_token[places.predicted_BM]).unique().tolist()) == set(
        range(1, last + 1)
    )


@pytest.mark.parametrize("keep, kept", [(0.25, 2), (0.5, 4), (0.3, 3), (0.01, 1), (1.0, 8)])
def test_the_encoder_sees_the_share_keep_of_each_cluster_except_the_last(keep: float, kept: int) -> None:
    model = build(clusters=(2, 2, 2), keep=keep)
    traced = trace(model, distinct_batch(5, (2, 4, 4)))
    places = locate(traced, (2, 4, 4), (1, 1, 1), (2, 2, 2))
    assert places.visible_BS.shape == (5, 3 * kept)
    assert all(len(set(row)) == len(row) for row in places.visible_BS.tolist())
    assert len({tuple(sorted(row)) for row in places.visible_BS.tolist()}) > 1 or keep == 1.0


@pytest.mark.parametrize("share, tokens", [(0.28, 7), (0.56, 14), (0.2, 5)])
def test_floating_point_errors_do_not_round_shares_up(share: float, tokens: int) -> None:
    """0.28 * 25 is 7.000000000000001 in floating point, but must give 7 tokens."""
    model = build(spec((2, 5, 5)), clusters=(1, 5, 5), keep=share, targets=share)
    traced = trace(model, random_batch(1, (2, 5, 5)))
    assert traced.visible.shape[1] == tokens
    assert traced.predicted.shape[1] == tokens


@pytest.mark.parametrize("targets, tokens", [(1.0, 8), (0.5, 4), (0.25, 2), (0.1, 1)])
def test_training_predicts_a_share_of_each_next_cluster_and_evaluation_all_of_it(targets: float, tokens: int) -> None:
    model = build(clusters=(2, 2, 2), targets=targets)
    batch = distinct_batch(4, (2, 4, 4))
    for training, count in [(True, tokens), (False, 8)]:
        traced = trace(model.train(training), batch)
        places = locate(traced, (2, 4, 4), (1, 1, 1), (2, 2, 2))
        assert places.predicted_BM.shape == (4, 3 * count)
        assert all(len(set(row)) == len(row) for row in places.predicted_BM.tolist())


def test_predicted_tokens_are_drawn_uniformly_in_training() -> None:
    model = build(clusters=(1, 2, 2), targets=0.25).train()
    predicted = trace(model, distinct_batch(1500, (2, 4, 4))).predicted
    counts = torch.bincount(predicted.flatten(), minlength=32)
    expected = 1500 * 7 / 32
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    "settings", [{"likelihood": "joint"}, {"likelihood": "digits"}, {"target": "pixels"}, {"ranks": 0.5}]
)
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.usefixtures("two_threads")
def test_a_samples_loss_does_not_depend_on_its_batch(settings: dict[str, Any], backend: str) -> None:
    model = build(**settings).train()
    set_backend(model, backend)
    one, other = random_batch(5, seed=1), random_batch(5, seed=2)
    mixed = {key: torch.cat([one[key][:2], other[key][2:]]) for key in one}
    assert torch.equal(trace(model, one).losses_BMP[:2], trace(model, mixed).losses_BMP[:2])
    alone = [trace(model, {key: value[i : i + 1] for key, value in one.items()}) for i in range(5)]
    assert torch.allclose(alone[0].losses_BMP[0], trace(model, one).losses_BMP[0], atol=1e-5)
    assert sum(x.loss for x in alone) / 5 == pytest.approx(model(one)["loss"].item(), rel=1e-5)


def test_the_loss_is_the_mean_of_all_nats_and_also_returned_in_bits() -> None:
    model = build(spec((4, 4, 4)), code_patch=(2, 1, 1)).eval()
    batch = random_batch(3, (4, 4, 4))
    out, traced = model(batch), trace(model, batch)
    assert traced.losses_BMP.shape == (3, 7 * 4, 2)
    assert out["loss"].requires_grad and not out["bits_per_code"].requires_grad
    assert out["loss"].shape == out["bits_per_code"].shape == ()
    assert out["loss"].item() == pytest.approx(traced.losses_BMP.mean().item())
    assert out["bits_per_code"].item() == pytest.approx(out["loss"].item() / math.log(2))


def test_a_pixel_loss_is_not_returned_in_bits() -> None:
    model = build(target="pixels").eval()
    batch = random_batch(3)
    out, traced = model(batch), trace(model, batch)
    assert set(out) == {"loss", "pixel_baseline"} and out["loss"].requires_grad
    assert traced.losses_BMP.shape == (3, 7 * 4, 8 * 3)
    assert out["loss"].item() == pytest.approx(traced.losses_BMP.mean().item())


@pytest.mark.parametrize("input", ["codes", "pixels"])
@pytest.mark.parametrize("target", ["codes", "pixels"])
def test_batches_need_pixels_only_if_pixels_are_configured(input: str, target: str) -> None:  # noqa: A002
    model = build(input=input, target=target)
    batch = random_batch(2)
    assert model.needs_pixels == ("pixels" in (input, target))
    if not model.needs_pixels:
        del batch["pixels_BTHWC"]
    assert model(batch)["loss"].isfinite()


@pytest.mark.parametrize("input, target", [("pixels", "pixels"), ("codes", "pixels"), ("pixels", "codes")])
def test_the_loss_falls_when_overfitting_one_batch(input: str, target: str) -> None:  # noqa: A002
    model = build(width=24, decoder_width=24, input=input, target=target, targets=1.0).train()
    losses = train(model, [random_batch(2)] * 80)
    # Loss of a constant prediction. The mean square of 8 pixels with an unbiased variance of 1 is 7 / 8.
    baseline = math.log(64) if target == "codes" else 7 / 8
    assert losses[0] > 0.9 * baseline
    assert losses[-1] < 0.65 * baseline


@pytest.mark.parametrize("geometry", ["digits", "codebook", "none"])
@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 1, 1)])
def test_the_loss_of_a_new_model_is_about_that_of_a_uniform_prediction(geometry: str, patch: Grid) -> None:
    shape = (4, 4, 4)
    for likelihood in ["joint", "digits"] if geometry == "digits" else ["joint"]:
        wide = {"width": 48, "decoder_width": 48, "code_patch": patch, "likelihood": likelihood}
        model = build(spec(shape, geometry), **wide).eval()
        assert model(random_batch(16, shape))["loss"].item() == pytest.approx(math.log(64), rel=0.15)


def test_code_input_rows_gives_every_code_its_own_vector_and_geometry_shares_them() -> None:
    codes = torch.arange(64).view(1, 64, 1)
    # Two digits of 8 values have 16 vectors, whose sums have rank 15.
    for code_input, rank in [("geometry", 15), ("rows", 64)]:
        model = build(code_input=code_input, width=96, heads=2)
        vectors = model.embedding(codes)[0]
        assert torch.linalg.matrix_rank(vectors) == rank


def test_codebook_codes_are_embedded_by_their_vectors() -> None:
    codes = torch.arange(64).view(1, 64, 1)
    by_geometry, by_rows = (
        build(spec(geometry="codebook"), width=96, heads=2, code_input=code_input)
        for code_input in ("geometry", "rows")
    )
    assert torch.linalg.matrix_rank(by_geometry.embedding(codes)[0]) == 5  # dimensions of the codebook
    assert torch.linalg.matrix_rank(by_rows.embedding(codes)[0]) == 64
    assert by_geometry(random_batch(2))["loss"].isfinite()


SHARES = ["keep", "targets", "ranks"]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("value", [0.0, 0, -0.1, -1, 1.5, 2, 1.0000001, math.nan, math.inf, -math.inf])
def test_a_share_outside_of_0_to_1_is_refused_by_name(share: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{share} .*got {value}"):
        build(**{share: value})


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("value", [1, 1.0, 1e-6])
def test_shares_of_1_and_nearly_0_are_valid(share: str, value: float) -> None:
    model = build(**{share: value}).train()
    assert model(random_batch(2))["loss"].isfinite()


@pytest.mark.parametrize(
    "changes, name",
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
        ({"causal": False, "keep": 1.0}, "causal.*keep"),
        ({"causal": False, "clusters": (1, 1, 1)}, "causal"),
        ({"codes": spec(geometry="codebook"), "likelihood": "digits"}, "likelihood digits"),
        ({"codes": CodeSpec(shape=(2, 4, 4), vocab_size=64), "input": "pixels"}, "keep_pixels"),
        ({"codes": CodeSpec(shape=(2, 4, 4), vocab_size=64), "target": "pixels"}, "keep_pixels"),
    ],
)
def test_invalid_settings_are_refused_by_name(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        build(**changes)


@pytest.mark.parametrize("others", [{}, {"input": "pixels", "target": "pixels"}], ids=["codes", "pixels"])
@pytest.mark.parametrize("name", ["order", "input", "target", "code_input", "likelihood"])
def test_a_misspelt_choice_is_refused_by_name(name: str, others: dict[str, Any]) -> None:
    """A misspelt value is refused even if the other settings make it irrelevant."""
    with pytest.raises(ValueError, match=f"{name}.* 'rasta'"):
        build(**{**others, name: "rasta"})
