"""Features are of whole clips, of whatever size, and draw nothing."""

import math

import pytest
import torch
from torch import Tensor

from ar_model.inputs import Patching
from ar_model.objectives import ARVideo
from tests.helpers.small_arvideo import (
    Batch,
    Grid,
    build,
    distinct_batch,
    random_batch,
    spec,
    spread,
    with_changed_places,
)


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_are_one_per_layer_of_whole_clips_in_raster_order(content: str) -> None:
    shape, patch = (4, 4, 4), (2, 1, 1)
    model = build(spec(shape), code_patch=patch, depth=3, clusters=(2, 2, 2), input=content).eval()
    batch = random_batch(2, shape)
    entered: list[Tensor] = []
    hook = model.encoder.blocks[0].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    layers = model.features(batch)
    hook.remove()
    assert model.time_slices(batch) == 2
    assert [tuple(layer.shape) for layer in layers] == [(2, 32, 12)] * 3
    tokens = (
        Patching("pixels", (4, 2, 2)).tokens(batch) if content == "pixels" else Patching("codes", patch).tokens(batch)
    )
    position_LD = model.positions(torch.arange(32)[None])[0][0]
    for token in range(32):
        own = model.embedding(tokens[:, token : token + 1])[:, 0] + position_LD[token]
        assert torch.allclose(entered[0][:, token], own, atol=1e-6)


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_see_the_whole_clip_and_draw_nothing(content: str) -> None:
    model = build(input=content, ranks=0.5).train()
    batch = distinct_batch(32, (2, 4, 4))
    before = model.features(batch)
    assert all(
        torch.equal(a, b) for a, b in zip(before, model.features({**batch, "seed_B": batch["seed_B"] + 1}), strict=True)
    )
    after = model.features(with_changed_places(batch, torch.arange(32)))
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


def grown(batch: Batch, model: ARVideo) -> Batch:
    """The same clips with twice the frames, rows and columns."""
    name = "codes_BTHW" if model.input.content == "codes" else "pixels_BTHWC"
    return {name: spread(batch[name])}


def uniform_batch() -> Batch:
    """A clip of one code and one colour, and another of others."""
    batch = random_batch(2)
    return {name: batch[name][:, :1, :1, :1].expand_as(batch[name]).clone() for name in ("codes_BTHW", "pixels_BTHWC")}


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_of_a_finer_clip_are_those_of_the_same_places(content: str, rope: bool) -> None:
    """The mean of the eight tokens at a place is closest to that place's own feature of the trained size."""
    model = build(input=content, rope=rope, width=24, heads=2, clusters=(1, 2, 2)).eval()
    batch = uniform_batch()
    with torch.no_grad():
        trained, finer = model.features(batch), model.features(grown(batch, model))
    assert [tuple(layer.shape) for layer in finer] == [(2, 4 * 8 * 8, 24)] * 2
    for known, found in zip(trained, finer, strict=True):
        means = found.view(2, 2, 2, 4, 2, 4, 2, 24).mean(dim=(2, 4, 6)).flatten(1, 3)
        distances = torch.cdist(means, known)
        assert torch.equal(distances.argmin(-1), torch.arange(32).expand(2, 32))
        off_centre = known - known.mean(1, keepdim=True)
        assert distances.diagonal(dim1=1, dim2=2).norm() < 0.25 * off_centre.norm()


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_of_longer_clips_have_a_token_for_every_place(content: str) -> None:
    model = build(input=content).eval()
    batch = random_batch(2, (6, 4, 8))
    with torch.no_grad():
        layers = model.features(batch)
        cut = {name: batch[name][:, :scale] for name, scale in (("codes_BTHW", 2), ("pixels_BTHWC", 4))}
        part = model.features(cut)
    assert [tuple(layer.shape) for layer in layers] == [(2, 6 * 4 * 8, 12)] * 2
    assert [tuple(layer.shape) for layer in part] == [(2, 2 * 4 * 8, 12)] * 2
    assert layers[-1].isfinite().all()


def test_clips_of_another_size_leave_the_model_as_it_was() -> None:
    model, batch = build().eval(), random_batch(2)
    before = model.features(batch)[-1]
    model.features(random_batch(2, (4, 8, 8)))
    assert torch.equal(model.features(batch)[-1], before)
    assert model.positions.grid == (2, 4, 4)


@pytest.mark.parametrize("content, shape", [("codes", (3, 4, 4)), ("pixels", (3, 4, 4)), ("pixels", (2, 5, 4))])
def test_clips_that_are_not_cut_evenly_are_refused(content: str, shape: Grid) -> None:
    model = build(spec((4, 4, 4)), code_patch=(2, 2, 1), clusters=(1, 2, 2), input=content).eval()
    with pytest.raises(ValueError, match=f"{content} do not divide"):
        model.features(random_batch(1, shape))


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_clips_of_another_length_have_as_many_slices_as_they_are_long(content: str) -> None:
    model = build(spec((4, 4, 4)), clusters=(2, 2, 2), input=content).eval()
    for shape in ((2, 4, 4), (3, 4, 4), (6, 2, 4)):
        batch = random_batch(2, shape)
        assert model.time_slices(batch) == shape[0]
        assert model.features(batch)[0].shape[1] == math.prod(shape)


def test_features_need_what_goes_in_and_not_what_is_predicted() -> None:
    model = build(input="codes", target="pixels")
    assert model.needs_pixels and not model.sees_pixels
    assert model.features({"codes_BTHW": random_batch(2)["codes_BTHW"]})[0].shape == (2, 32, 12)
    assert build(input="pixels", target="codes").sees_pixels
