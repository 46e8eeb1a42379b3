"""Pixels and codes of a token come from the same place; a tubelet enters as through a convolution."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ar_model.inputs import CodeEmbedding, CodeSpec, Grid, Patching, TubeletEmbedding, make_input, take


def known(shape: Grid, clip: Grid | None) -> CodeSpec:
    return CodeSpec(shape=shape, vocab_size=16, levels=(4, 4), clip=clip)


@pytest.mark.parametrize(
    "shape, clip, patch, tubelet",
    [
        ((2, 4, 4), (4, 16, 16), (1, 1, 1), (2, 4, 4)),
        ((4, 4, 2), (4, 8, 6), (2, 2, 1), (2, 4, 3)),
        ((4, 2, 6), (8, 4, 12), (1, 2, 3), (2, 4, 6)),
        ((3, 2, 2), (3, 2, 2), (3, 1, 2), (3, 1, 2)),
    ],
)
def test_pixels_and_codes_of_a_token_come_from_the_same_place(
    shape: Grid, clip: Grid, patch: Grid, tubelet: Grid
) -> None:
    spec = known(shape, clip)
    codes_cut, pixels_cut = Patching.of("codes", spec, patch), Patching.of("pixels", spec, patch)
    assert codes_cut == Patching("codes", patch) and pixels_cut == Patching("pixels", tubelet)
    assert codes_cut.grid(shape) == pixels_cut.grid(clip)
    codes = torch.arange(2 * shape[0] * shape[1] * shape[2]).view(2, *shape)
    pixels = codes
    for axis, (n, of) in enumerate(zip(clip, shape, strict=True), start=1):
        pixels = pixels.repeat_interleave(n // of, axis)
    pixels = torch.stack([pixels, pixels + 1000, pixels + 2000], dim=-1)
    batch = {"codes_BTHW": codes, "pixels_BTHWC": pixels}
    of_codes, of_pixels = codes_cut.tokens(batch), pixels_cut.tokens(batch)
    assert of_codes.shape[:2] == of_pixels.shape[:2]
    for b, token in itertools.product(range(2), range(of_codes.shape[1])):
        for colour in range(3):
            found = of_pixels[b, token, :, colour] - 1000 * colour
            assert set(found.tolist()) == set(of_codes[b, token].tolist())
            assert (found.bincount(minlength=2)[of_codes[b, token]] == len(found) // of_codes.shape[2]).all()


def test_codes_of_a_token_are_those_of_its_box_in_raster_order() -> None:
    codes = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)
    cut = Patching("codes", (2, 2, 1))
    tokens = cut.tokens({"codes_BTHW": codes})
    assert tokens.shape == (1, 8, 4)
    for token, (h, w) in enumerate(itertools.product(range(2), range(4))):
        assert tokens[0, token].tolist() == codes[0, :, 2 * h : 2 * h + 2, w].flatten().tolist()
    assert cut.grid((2, 4, 4)) == (1, 2, 4)


def test_pixels_of_a_token_are_those_of_its_tubelet_in_raster_order() -> None:
    clip = torch.randint(0, 256, (2, 4, 6, 6, 3), dtype=torch.uint8)
    tokens = Patching("pixels", (2, 3, 2)).tokens({"pixels_BTHWC": clip})
    assert tokens.shape == (2, 2 * 2 * 3, 12, 3) and tokens.dtype == torch.uint8
    for token, (t, h, w) in enumerate(itertools.product(range(2), range(2), range(3))):
        box = clip[:, 2 * t : 2 * t + 2, 3 * h : 3 * h + 3, 2 * w : 2 * w + 2]
        assert torch.equal(tokens[:, token], box.flatten(1, 3))


@pytest.mark.parametrize("patch", [(3, 1, 1), (1, 4, 1), (1, 1, 3), (0, 1, 1), (1, -1, 1)])
@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_a_patch_that_does_not_divide_the_codes_is_refused(content: str, patch: Grid) -> None:
    with pytest.raises(ValueError, match="code_patch"):
        Patching.of(content, known((2, 2, 2), (4, 8, 8)), patch)  # type: ignore[arg-type]


def test_pixels_of_a_cache_without_them_are_refused_with_the_way_to_keep_them() -> None:
    assert Patching.of("codes", known((2, 2, 2), None), (1, 1, 1)) == Patching("codes", (1, 1, 1))
    with pytest.raises(ValueError, match="--keep_pixels"):
        Patching.of("pixels", known((2, 2, 2), None), (1, 1, 1))


@pytest.mark.parametrize("clip", [(17, 16, 16), (10, 15, 16), (10, 16, 18)])
def test_clips_that_tokens_do_not_cut_evenly_are_refused_with_both_sizes(clip: Grid) -> None:
    """A causal tokenizer makes 5 codes of 17 frames: its codes are fine, its pixels cannot be cut so."""
    spec = known((5, 4, 4), clip)
    assert Patching.of("codes", spec, (1, 1, 1)).box == (1, 1, 1)
    with pytest.raises(ValueError) as error:
        Patching.of("pixels", spec, (1, 1, 1))
    assert str(clip) in str(error.value) and str(spec.shape) in str(error.value)


def test_take_gathers_the_content_of_each_samples_own_tokens() -> None:
    tokens_BM = torch.tensor([[3, 0, 3], [1, 2, 0]])
    for content in (torch.randn(2, 4, 5), torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)):
        found = take(content, tokens_BM)
        assert found.shape == (2, 3, *content.shape[2:]) and found.dtype == content.dtype
        for b, m in itertools.product(range(2), range(3)):
            assert torch.equal(found[b, m], content[b, tokens_BM[b, m]])


def convolved(embedding: TubeletEmbedding, clip_BTHWC: Tensor, tubelet: Grid) -> Tensor:
    """The same weights as a 3-D convolution of ImageNet-normalised pixels whose stride is its size, (B, L, D)."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x_BCTHW = ((clip_BTHWC.double() / 255 - mean) / deviation).permute(0, 4, 1, 2, 3)
    weight = embedding.projection.weight.double().unflatten(1, (*tubelet, 3)).permute(0, 4, 1, 2, 3)
    return F.conv3d(x_BCTHW, weight, embedding.projection.bias.double(), stride=tubelet).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("tubelet", [(2, 4, 4), (1, 2, 3)])
def test_a_tubelet_enters_as_through_a_convolution_whose_stride_is_its_size(tubelet: Grid) -> None:
    torch.manual_seed(0)
    embedding = TubeletEmbedding(7, tubelet)
    torch.nn.init.normal_(embedding.projection.bias)
    clip = torch.randint(0, 256, (2, 4, 8, 12, 3), dtype=torch.uint8)
    found = embedding(Patching("pixels", tubelet).tokens({"pixels_BTHWC": clip}))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), convolved(embedding, clip, tubelet), atol=1e-5)


def test_pixels_add_nothing_but_the_projection_to_the_weights() -> None:
    assert set(TubeletEmbedding(7, (2, 4, 4)).state_dict()) == {"projection.weight", "projection.bias"}


def test_the_first_layer_fits_the_cut() -> None:
    spec = known((2, 4, 4), (4, 16, 16))
    pixels = make_input(Patching.of("pixels", spec, (2, 1, 1)), spec, 6, "geometry")
    assert isinstance(pixels, TubeletEmbedding)
    assert pixels.projection.in_features == 4 * 4 * 4 * 3
    codes = make_input(Patching.of("codes", spec, (2, 1, 1)), spec, 6, "rows")
    assert isinstance(codes, CodeEmbedding) and codes.table.rows is not None
    assert codes(torch.zeros(1, 3, 2, dtype=torch.long)).shape == (1, 3, 6)
    codes = make_input(Patching.of("codes", spec, (1, 1, 1)), spec, 6, "geometry")
    assert isinstance(codes, CodeEmbedding) and codes.table.rows is None
