"""Features cover whole clips of any size and are deterministic."""

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
    with_changed_positions,
)


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_have_all_tokens_of_every_layer_in_raster_order(content: str) -> None:
    shape, patch = (4, 4, 4), (2, 1, 1)
    model = build(spec(shape), code_patch=patch, depth=3, clusters=(2, 2, 2), input=content).eval()
    batch = random_batch(2, shape)
    inputs: list[Tensor] = []
    hook = model.encoder.blocks[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    layers = model.features(batch)
    hook.remove()
    assert model.grid_of(batch) == (2, 4, 4)
    assert [tuple(layer.shape) for layer in layers] == [(2, 32, 12)] * 3
    patching = Patching("pixels", (4, 2, 2)) if content == "pixels" else Patching("codes", patch)
    tokens = patching.tokens(batch)
    position_LD = model.positions(torch.arange(32)[None])[0][0]
    for token in range(32):
        expected = model.embedding(tokens[:, token : token + 1])[:, 0] + position_LD[token]
        assert torch.allclose(inputs[0][:, token], expected, atol=1e-6)


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_depend_on_the_whole_clip_and_not_on_the_seed(content: str) -> None:
    model = build(input=content, ranks=0.5).train()
    batch = distinct_batch(32, (2, 4, 4))
    before = model.features(batch)
    other_seed = model.features({**batch, "seed_B": batch["seed_B"] + 1})
    assert all(torch.equal(a, b) for a, b in zip(before, other_seed, strict=True))
    after = model.features(with_changed_positions(batch, torch.arange(32)))
    assert ((before[-1] != after[-1]).any(-1)).all()


@pytest.mark.usefixtures("two_threads")
def test_features_do_not_depend_on_the_other_clips() -> None:
    model = build().eval()
    one, other = random_batch(4, seed=1), random_batch(4, seed=2)
    mixed = {key: torch.cat([one[key][:1], other[key][1:]]) for key in one}
    assert torch.equal(model.features(one)[-1][0], model.features(mixed)[-1][0])


@pytest.mark.parametrize("rope", [True, False])
def test_features_depend_on_positions_with_and_without_rope(rope: bool) -> None:
    model = build(rope=rope).eval()
    batch = random_batch(1)
    reversed_batch = {**batch, "codes_BTHW": batch["codes_BTHW"].flip(1)}
    features, reversed_features = model.features(batch)[-1], model.features(reversed_batch)[-1]
    assert not torch.allclose(features, reversed_features.view(1, 2, 16, 12).flip(1).flatten(1, 2), atol=1e-3)


def upsampled(batch: Batch, model: ARVideo) -> Batch:
    """Return the same clips with twice the frames, rows and columns."""
    name = "codes_BTHW" if model.input.content == "codes" else "pixels_BTHWC"
    return {name: spread(batch[name])}


def uniform_batch() -> Batch:
    """Return two clips, each of one code and one colour."""
    batch = random_batch(2)
    return {name: batch[name][:, :1, :1, :1].expand_as(batch[name]).clone() for name in ("codes_BTHW", "pixels_BTHWC")}


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_of_an_upsampled_clip_match_the_same_positions(content: str, rope: bool) -> None:
    """The mean of the eight tokens at a position is closest to the feature of this position in the trained size."""
    model = build(input=content, rope=rope, width=24, heads=2, clusters=(1, 2, 2)).eval()
    batch = uniform_batch()
    with torch.no_grad():
        trained, upsampled_features = model.features(batch), model.features(upsampled(batch, model))
    assert [tuple(layer.shape) for layer in upsampled_features] == [(2, 4 * 8 * 8, 24)] * 2
    for layer, upsampled_layer in zip(trained, upsampled_features, strict=True):
        means = upsampled_layer.view(2, 2, 2, 4, 2, 4, 2, 24).mean(dim=(2, 4, 6)).flatten(1, 3)
        distances = torch.cdist(means, layer)
        assert torch.equal(distances.argmin(-1), torch.arange(32).expand(2, 32))
        centred = layer - layer.mean(1, keepdim=True)
        assert distances.diagonal(dim1=1, dim2=2).norm() < 0.25 * centred.norm()


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_features_of_clips_of_other_sizes_have_all_tokens(content: str) -> None:
    model = build(input=content).eval()
    batch = random_batch(2, (6, 4, 8))
    with torch.no_grad():
        layers = model.features(batch)
        cut = {name: batch[name][:, :scale] for name, scale in (("codes_BTHW", 2), ("pixels_BTHWC", 4))}
        part = model.features(cut)
    assert [tuple(layer.shape) for layer in layers] == [(2, 6 * 4 * 8, 12)] * 2
    assert [tuple(layer.shape) for layer in part] == [(2, 2 * 4 * 8, 12)] * 2
    assert layers[-1].isfinite().all()


def test_clips_of_another_size_do_not_change_the_model() -> None:
    model, batch = build().eval(), random_batch(2)
    before = model.features(batch)[-1]
    model.features(random_batch(2, (4, 8, 8)))
    assert torch.equal(model.features(batch)[-1], before)
    assert model.positions.grid == (2, 4, 4)


@pytest.mark.parametrize("content, shape", [("codes", (3, 4, 4)), ("pixels", (3, 4, 4)), ("pixels", (2, 5, 4))])
def test_clips_that_tokens_do_not_divide_are_refused(content: str, shape: Grid) -> None:
    model = build(spec((4, 4, 4)), code_patch=(2, 2, 1), clusters=(1, 2, 2), input=content).eval()
    with pytest.raises(ValueError, match=f"{content} do not divide"):
        model.features(random_batch(1, shape))


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_the_grid_follows_the_size_of_the_clips(content: str) -> None:
    model = build(spec((4, 4, 4)), clusters=(2, 2, 2), input=content).eval()
    for shape in ((2, 4, 4), (3, 4, 4), (6, 2, 4)):
        batch = random_batch(2, shape)
        assert model.grid_of(batch) == shape
        assert model.features(batch)[0].shape[1] == math.prod(shape)


def test_features_need_the_input_but_not_the_target() -> None:
    model = build(input="codes", target="pixels")
    assert model.needs_pixels and not model.sees_pixels
    assert model.features({"codes_BTHW": random_batch(2)["codes_BTHW"]})[0].shape == (2, 32, 12)
    assert build(input="pixels", target="codes").sees_pixels
