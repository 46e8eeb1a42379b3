"""ARVideo's prediction of a cluster depends on all clusters of lower rank and on nothing else, with all settings."""

import math
import random
from typing import Any, NamedTuple

import pytest
import torch

from ar_model.attention import set_backend
from ar_model.objectives import ARVideo
from tests.helpers.small_arvideo import Grid, build, distinct_batch, locate, spec, trace, with_changed_positions


def assert_nothing_leaks(model: ARVideo, shape: Grid, patch: Grid, box: Grid, ranks: int, samples: int) -> None:
    """Change one position of each sample and assert which outputs change.

    Both passes have equal shapes, so outputs that must not change are bit-equal.
    """
    batch = distinct_batch(samples, shape)
    before = trace(model, batch)
    places = locate(before, shape, patch, box, ranks)
    sample_B = torch.arange(samples)
    position_B = sample_B % math.prod(shape)
    after = trace(model, with_changed_positions(batch, position_B))

    token_B = places.token_of_code[position_B]
    rank_B = places.rank_BC[sample_B, places.cluster_of_token[token_B]]
    visible_rank_BS = places.rank_BC.gather(1, places.cluster_of_token[places.visible_BS])
    predicted_rank_BM = places.rank_BC.gather(1, places.cluster_of_token[places.predicted_BM])
    visible_B = (places.visible_BS == token_B[:, None]).any(1)
    assert visible_B.any(), "the changed token is visible in no sample"

    allowed_BS = visible_B[:, None] & ((visible_rank_BS >= rank_B[:, None]) | (not model.causal))
    for old, new in zip(before.layers, after.layers, strict=True):
        changed_BS = (old != new).any(-1)
        assert not (changed_BS & ~allowed_BS).any(), "a lower rank of the encoder depends on the token"
        assert torch.equal(changed_BS.any(1), visible_B)
    assert changed_BS[allowed_BS].float().mean() > 0.99, "the last layer does not depend on a token that it may see"

    changed_BM = (before.decoded_BMD != after.decoded_BMD).any(-1)
    allowed_BM = visible_B[:, None] & ((predicted_rank_BM > rank_B[:, None]) | (not model.causal))
    assert not (changed_BM & ~allowed_BM).any(), "the prediction of a cluster depends on the cluster or a later one"
    assert changed_BM[allowed_BM].float().mean() > 0.99, "a prediction does not depend on a token that it may see"
    assert model.causal or torch.equal(changed_BM, allowed_BM)

    own_BM = places.predicted_BM == token_B[:, None]
    changed_BM = (before.losses_BMP != after.losses_BMP).any(-1)
    assert not (changed_BM & ~allowed_BM & ~own_BM).any(), "a prediction has another token as its target"
    assert changed_BM[own_BM].all()


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
    pytest.param((2, 4, 4), (1, 1, 1), (1, 2, 2), {"decoder_self": True, "targets": 1.0}, id="decoder_self"),
    pytest.param((2, 4, 4), (1, 1, 1), (1, 2, 2), {"input": "pixels", "target": "pixels"}, id="pixels to pixels"),
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("shape, patch, box, settings", LEAKS)
def test_a_token_affects_predictions_of_higher_ranks_only(
    shape: Grid, patch: Grid, box: Grid, settings: dict[str, Any], backend: str, training: bool
) -> None:
    model = build(spec(shape), code_patch=patch, clusters=box, **settings).train(training)
    set_backend(model, backend)
    clusters = math.prod(shape) // math.prod(patch) // math.prod(box)
    assert_nothing_leaks(model, shape, patch, box, clusters - 1, samples=math.prod(shape))


class Case(NamedTuple):
    shape: Grid
    patch: Grid
    box: Grid
    settings: dict[str, Any]
    backend: str
    training: bool


def draw_case(number: int) -> Case:
    """Draw a valid combination of settings."""
    draw = random.Random(number)
    shape = draw.choice([(2, 4, 4), (4, 2, 4), (4, 4, 2), (3, 3, 4), (4, 4, 4)])
    patch = (2, 1, 1) if shape[0] % 2 == 0 and draw.random() < 0.3 else (1, 1, 1)
    grid = (shape[0] // patch[0], shape[1], shape[2])
    box = grid
    while box == grid:
        box = tuple(draw.choice([k for k in range(1, side + 1) if side % k == 0]) for side in grid)
    size = math.prod(box)
    causal = size == 1 or draw.random() < 0.75
    settings = {
        "order": draw.choice(["random", "random", "spatial-first", "temporal-first"]),
        "keep": draw.uniform(0.05, 1.0 if causal else (size - 1) / size),
        "targets": draw.uniform(0.05, 1.0),
        "ranks": draw.choice([1.0, draw.uniform(0.1, 1.0)]),
        "causal": causal,
        "decoder_self": draw.random() < 0.5,
        "rope": draw.random() < 0.5,
        "input": draw.choice(["codes", "pixels"]),
        "target": draw.choice(["codes", "pixels"]),
        "likelihood": draw.choice(["joint", "digits"]),
    }
    return Case(shape, patch, box, settings, draw.choice(["plain", "sdpa"]), draw.random() < 0.8)


@pytest.mark.parametrize("number", range(100))
def test_nothing_leaks_with_random_settings(number: int) -> None:
    case = draw_case(number)
    model = build(spec(case.shape), code_patch=case.patch, clusters=case.box, **case.settings).train(case.training)
    set_backend(model, case.backend)
    predicted = math.prod(case.shape) // math.prod(case.patch) // math.prod(case.box) - 1
    ranks = math.ceil(case.settings["ranks"] * predicted) if case.training else predicted
    assert_nothing_leaks(model, case.shape, case.patch, case.box, ranks, samples=3 * math.prod(case.shape))


def test_the_random_settings_include_every_choice() -> None:
    cases = [draw_case(number) for number in range(100)]
    for name, choices in {
        "order": {"random", "spatial-first", "temporal-first"},
        "causal": {True, False},
        "decoder_self": {True, False},
        "rope": {True, False},
        "input": {"codes", "pixels"},
        "target": {"codes", "pixels"},
    }.items():
        assert {case.settings[name] for case in cases} == choices
    assert sum(case.training and case.settings["ranks"] < 1 for case in cases) > 20
    assert sum(case.training and case.settings["ranks"] < 1 and case.settings["decoder_self"] for case in cases) > 10
    assert {case.backend for case in cases} == {"plain", "sdpa"}


@pytest.mark.parametrize("input, target", [("codes", "pixels"), ("pixels", "codes")])
def test_predictions_depend_on_the_input_content_only(input: str, target: str) -> None:  # noqa: A002
    model = build(input=input, target=target).train()
    batch, other = distinct_batch(8, (2, 4, 4)), distinct_batch(8, (2, 4, 4))
    name = {"codes": "codes_BTHW", "pixels": "pixels_BTHWC"}
    other[name[target]] = other[name[target]].flip(0, 1, 2, 3) // 2
    before, after = trace(model, batch), trace(model, other)
    assert torch.equal(before.decoded_BMD, after.decoded_BMD)
    assert not torch.equal(before.loss, after.loss)
    other = distinct_batch(8, (2, 4, 4))
    other[name[input]] = other[name[input]].flip(0, 1, 2, 3) // 2
    assert not torch.equal(before.decoded_BMD, trace(model, other).decoded_BMD)


@pytest.mark.parametrize("training, targets, count", [(True, 0.25, 2), (True, 1.0, 5), (False, 0.25, 5)])
@pytest.mark.parametrize("decoder_self", [False, True])
def test_without_the_causal_mask_dropped_tokens_are_predicted_from_all_visible_ones(
    decoder_self: bool, training: bool, targets: float, count: int
) -> None:
    shape, box = (2, 4, 4), (2, 2, 2)
    model = build(clusters=box, causal=False, keep=0.3, targets=targets, decoder_self=decoder_self).train(training)
    places = locate(trace(model, distinct_batch(32, shape)), shape, (1, 1, 1), box)
    assert places.predicted_BM.shape[1] == 3 * count
    assert not (places.visible_BS[:, :, None] == places.predicted_BM[:, None, :]).any()
    assert_nothing_leaks(model, shape, (1, 1, 1), box, ranks=3, samples=32)


@pytest.mark.parametrize("decoder_self", [False, True])
def test_queries_see_queries_of_lower_ranks_only_with_decoder_self(decoder_self: bool) -> None:
    """The test changes the position encoding of one query. Without self-attention, only the output of this query changes."""
    model = build(decoder_self=decoder_self, rope=False, decoder_depth=1).eval()
    batch = distinct_batch(4, (2, 4, 4))
    before = trace(model, batch)
    places = locate(before, (2, 4, 4), (1, 1, 1), (1, 2, 2))
    token = int(places.predicted_BM[0, 3 * 4])  # a token of the cluster of rank 4 of the first sample
    model.query_positions.encoding_LD[token] += 1.0
    changed_M = (before.decoded_BMD != trace(model, batch).decoded_BMD).any(-1)[0]
    rank_M = places.rank_BC.gather(1, places.cluster_of_token[places.predicted_BM])[0]
    assert torch.equal(changed_M, rank_M >= 4 if decoder_self else places.predicted_BM[0] == token)
