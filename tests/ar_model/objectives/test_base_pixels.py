"""Pixels and codes of a token cover the same part of the clip. Tubelets are embedded as by a convolution."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ar_model.inputs import CodeEmbedding, CodeSpec, Grid, Patching, TubeletEmbedding, make_input, take


def code_spec(shape: Grid, clip: Grid | None) -> CodeSpec:
    return CodeSpec(shape=shape, vocab_size=16, levels=((4, 4),), clip=clip)


@pytest.mark.parametrize(
    "shape, clip, patch, tubelet",
    [
        ((2, 4, 4), (4, 16, 16), (1, 1, 1), (2, 4, 4)),
        ((4, 4, 2), (4, 8, 6), (2, 2, 1), (2, 4, 3)),
        ((4, 2, 6), (8, 4, 12), (1, 2, 3), (2, 4, 6)),
        ((3, 2, 2), (3, 2, 2), (3, 1, 2), (3, 1, 2)),
    ],
)
def test_pixels_and_codes_of_a_token_cover_the_same_part_of_the_clip(
    shape: Grid, clip: Grid, patch: Grid, tubelet: Grid
) -> None:
    """Every pixel has the value of its code (plus 1000 for each channel)."""
    spec = code_spec(shape, clip)
    code_patching, pixel_patching = Patching.of("codes", spec, patch), Patching.of("pixels", spec, patch)
    assert code_patching == Patching("codes", patch) and pixel_patching == Patching("pixels", tubelet)
    assert code_patching.grid(shape) == pixel_patching.grid(clip)
    codes = torch.arange(2 * shape[0] * shape[1] * shape[2]).view(2, *shape)
    pixels = codes
    for axis, (pixels_N, codes_N) in enumerate(zip(clip, shape, strict=True), start=1):
        pixels = pixels.repeat_interleave(pixels_N // codes_N, axis)
    pixels = torch.stack([pixels, pixels + 1000, pixels + 2000], dim=-1)
    batch = {"codes_BTHW": codes, "pixels_BTHWC": pixels}
    code_tokens, pixel_tokens = code_patching.tokens(batch), pixel_patching.tokens(batch)
    assert code_tokens.shape[:2] == pixel_tokens.shape[:2]
    for b, token in itertools.product(range(2), range(code_tokens.shape[1])):
        own_codes = code_tokens[b, token]
        for channel in range(3):
            values = pixel_tokens[b, token, :, channel] - 1000 * channel
            assert set(values.tolist()) == set(own_codes.tolist())
            assert (values.bincount(minlength=2)[own_codes] == len(values) // len(own_codes)).all()


def test_a_token_has_the_codes_of_its_box_in_raster_order() -> None:
    codes = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)
    patching = Patching("codes", (2, 2, 1))
    tokens = patching.tokens({"codes_BTHW": codes})
    assert tokens.shape == (1, 8, 4)
    for token, (h, w) in enumerate(itertools.product(range(2), range(4))):
        assert tokens[0, token].tolist() == codes[0, :, 2 * h : 2 * h + 2, w].flatten().tolist()
    assert patching.grid((2, 4, 4)) == (1, 2, 4)


def test_a_token_has_the_pixels_of_its_tubelet_in_raster_order() -> None:
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
        Patching.of(content, code_spec((2, 2, 2), (4, 8, 8)), patch)  # type: ignore[arg-type]


def test_pixels_of_a_cache_without_pixels_are_refused_with_the_flag() -> None:
    assert Patching.of("codes", code_spec((2, 2, 2), None), (1, 1, 1)) == Patching("codes", (1, 1, 1))
    with pytest.raises(ValueError, match="--keep_pixels"):
        Patching.of("pixels", code_spec((2, 2, 2), None), (1, 1, 1))


@pytest.mark.parametrize("clip", [(17, 16, 16), (10, 15, 16), (10, 16, 18)])
def test_pixels_that_tokens_do_not_divide_are_refused_with_both_sizes(clip: Grid) -> None:
    """A causal tokenizer makes 5 codes along time from 17 frames. Its codes can be used, but 5 does not divide the 17 frames."""
    spec = code_spec((5, 4, 4), clip)
    assert Patching.of("codes", spec, (1, 1, 1)).box == (1, 1, 1)
    with pytest.raises(ValueError) as error:
        Patching.of("pixels", spec, (1, 1, 1))
    assert str(clip) in str(error.value) and str(spec.shape) in str(error.value)


def test_take_gathers_the_content_of_each_samples_own_tokens() -> None:
    tokens_BM = torch.tensor([[3, 0, 3], [1, 2, 0]])
    for content in (torch.randn(2, 4, 5), torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)):
        taken = take(content, tokens_BM)
        assert taken.shape == (2, 3, *content.shape[2:]) and taken.dtype == content.dtype
        for b, m in itertools.product(range(2), range(3)):
            assert torch.equal(taken[b, m], content[b, tokens_BM[b, m]])


def convolved(embedding: TubeletEmbedding, clip_BTHWC: Tensor, tubelet: Grid) -> Tensor:
    """Apply the same weights as a 3-D convolution to ImageNet-normalised pixels, (B, L, D)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x_BCTHW = ((clip_BTHWC.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    weight = embedding.projection.weight.double().unflatten(1, (*tubelet, 3)).permute(0, 4, 1, 2, 3)
    return F.conv3d(x_BCTHW, weight, embedding.projection.bias.double(), stride=tubelet).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("tubelet", [(2, 4, 4), (1, 2, 3)])
def test_tubelets_are_embedded_as_by_a_convolution(tubelet: Grid) -> None:
    torch.manual_seed(0)
    embedding = TubeletEmbedding(7, tubelet)
    torch.nn.init.normal_(embedding.projection.bias)
    clip = torch.randint(0, 256, (2, 4, 8, 12, 3), dtype=torch.uint8)
    x_BLD = embedding(Patching("pixels", tubelet).tokens({"pixels_BTHWC": clip}))
    assert x_BLD.dtype == torch.float32
    assert torch.allclose(x_BLD.double(), convolved(embedding, clip, tubelet), atol=1e-5)


def test_only_the_projection_of_tubelets_is_saved() -> None:
    assert set(TubeletEmbedding(7, (2, 4, 4)).state_dict()) == {"projection.weight", "projection.bias"}


def test_make_input_fits_the_patching() -> None:
    spec = code_spec((2, 4, 4), (4, 16, 16))
    pixels = make_input(Patching.of("pixels", spec, (2, 1, 1)), spec, 6, "geometry")
    assert isinstance(pixels, TubeletEmbedding)
    assert pixels.projection.in_features == 4 * 4 * 4 * 3
    codes = make_input(Patching.of("codes", spec, (2, 1, 1)), spec, 6, "rows")
    assert isinstance(codes, CodeEmbedding) and codes.table.rows is not None
    assert codes(torch.zeros(1, 3, 2, dtype=torch.long)).shape == (1, 3, 6)
    codes = make_input(Patching.of("codes", spec, (1, 1, 1)), spec, 6, "geometry")
    assert isinstance(codes, CodeEmbedding) and codes.table.rows is None
