"""The linear tokenizer: exact codes, levels of components, one-line refusals."""

import math
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tokenizer import Linear, load_tokenizer
from tokenizer.levels import centres_and_thresholds, levels_of
from tokenizer.measures import psnr_of


def moving_texture(clips: int, seed: int = 0, frames: int = 4, side: int = 32) -> Tensor:
    """Smooth coloured noise that moves, uint8 (B, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(clips, 3, side // 4 + 3, side // 4 + 3, generator=generator)
    large = torch.nn.functional.interpolate(small, scale_factor=4, mode="bicubic").clamp(0, 1)
    shifted = [large[:, :, t : t + side, 2 * t : 2 * t + side] for t in range(frames)]
    return (torch.stack(shifted, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


TRAINING, HELD_OUT = moving_texture(24), moving_texture(6, seed=1)


@pytest.fixture(scope="module")
def linear() -> Linear:
    return Linear.fit("linear-2x8x8-4x1000", TRAINING)


def test_codes_do_not_depend_on_batch_stream_threads_or_precision(linear: Linear) -> None:
    codes = linear.encode(HELD_OUT)
    assert codes.shape == (6, 2, 4, 4, 4) and codes.dtype == torch.int64
    alone = torch.cat([linear.encode(clip[None]) for clip in HELD_OUT])
    streamed = torch.cat(list(linear.encode_stream(HELD_OUT.split(3, 1))), 1)
    with torch.autocast("cpu", torch.bfloat16):
        low_precision = linear.encode(HELD_OUT)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded = linear.encode(HELD_OUT.repeat(40, 1, 1, 1, 1))[:6]
    finally:
        torch.set_num_threads(threads)
    for other in (alone, streamed, low_precision, threaded):
        assert torch.equal(other, codes)


def test_values_are_the_exact_product_of_pixels_and_weights(linear: Linear) -> None:
    """The reference computes with Python's integers. A level is the number of thresholds that a value reaches."""
    clip = HELD_OUT[:1, :2, :8, :8]
    pixels = [int(v) for v in clip.flatten()]
    digits = []
    for column, thresholds in zip(linear.weight_PD.T.tolist(), linear.threshold_DL.tolist(), strict=True):
        value = sum(pixel * weight for pixel, weight in zip(pixels, column, strict=True))
        digits.append(sum(value >= threshold for threshold in thresholds))
    expected = []
    for levels in linear.levels:
        code, radix = 0, 1
        for level in levels:
            code, radix = code + digits.pop(0) * radix, radix * level
        expected.append(code)
    assert linear.encode(clip).flatten().tolist() == expected


def test_more_codes_keep_more(linear: Linear) -> None:
    names = ["linear-2x8x8-1000", "linear-2x8x8-4x1000", "linear-2x8x8-16x1000"]
    tokenizers = [Linear.fit(name, TRAINING) for name in names]
    quality = [psnr_of(HELD_OUT, t.decode(t.encode(HELD_OUT))).mean().item() for t in tokenizers]
    assert quality == sorted(quality) and quality[-1] > quality[0] + 5
    assert torch.equal(tokenizers[1].encode(HELD_OUT), linear.encode(HELD_OUT)), (
        "the fit is a function of its arguments"
    )


def test_one_code_per_place_has_no_axis_of_codes() -> None:
    codes = Linear.fit("linear-2x8x8-1000", TRAINING).encode(HELD_OUT)
    assert codes.shape == (6, 2, 4, 4)


def test_decoding_gives_the_mean_of_the_blocks_of_a_code() -> None:
    """With one component per place, no other pixels for a code are closer to the blocks of the training clips that have it."""
    tokenizer = Linear.fit("linear-2x8x8-5", TRAINING)
    blocks_NP = rearrange(TRAINING, "b (t p) (h q) (w r) c -> (b t h w) (p q r c)", p=2, q=8, r=8).double()
    codes_N = tokenizer.encode(TRAINING).flatten()
    direction_P = tokenizer.basis_DP[0].double()
    for code in codes_N.unique().tolist():
        decoded = tokenizer.decode(torch.full((1, 1, 1, 1), code)).flatten().double()
        mean_P = blocks_NP[codes_N == code].mean(0)
        assert ((decoded - mean_P) @ direction_P).abs() < 2, "rounding of 384 pixels"
        across_P = (decoded - blocks_NP.mean(0)) - ((decoded - blocks_NP.mean(0)) @ direction_P) * direction_P
        assert across_P.abs().max() < 1.5, "the other components have their means"


@pytest.mark.parametrize(
    ("vocabulary", "levels"),
    [(2, (2,)), (24, (24,)), (25, (5, 5)), (64, (9, 7)), (1000, (8, 5, 5, 5)), (65536, (7, 7, 7, 7, 5, 5))],
)
def test_levels_use_the_vocabulary(vocabulary: int, levels: tuple[int, ...]) -> None:
    assert levels_of(vocabulary) == levels


def test_every_vocabulary_has_levels_that_fit() -> None:
    for vocabulary in range(2, 2000):
        levels = levels_of(vocabulary)
        assert vocabulary / 2 < math.prod(levels) <= vocabulary
        assert all(n % 2 == 1 and n >= 5 for n in levels[1:])


def test_levels_of_a_normal_component_are_equally_likely() -> None:
    values = 3 + 2 * torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centres, thresholds = centres_and_thresholds(values, 4)
    assert thresholds.tolist() == pytest.approx([3 - 2 * 0.6745, 3, 3 + 2 * 0.6745], abs=0.03)
    # Mean of a standard normal variable in the outer and inner quarters.
    assert centres.tolist() == pytest.approx([3 - 2 * 1.271, 3 - 2 * 0.325, 3 + 2 * 0.325, 3 + 2 * 1.271], abs=0.03)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8])
def test_levels_without_samples_stay_in_order(levels: int) -> None:
    centres, thresholds = centres_and_thresholds(torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 10], dtype=torch.float64), levels)
    assert len(centres) == levels and centres.diff().min() >= 0
    assert (centres[1:] >= thresholds).all() and (centres[:-1] <= thresholds).all()


def test_each_code_has_a_component_of_a_large_variance() -> None:
    tokenizer = Linear.fit("linear-2x8x8-4x1000", TRAINING)
    blocks_NP = rearrange(TRAINING, "b (t p) (h q) (w r) c -> (b t h w) (p q r c)", p=2, q=8, r=8).double()
    variance_GD = (blocks_NP @ tokenizer.basis_DP.double().T).var(0).view(4, 4)
    order = variance_GD.T.flatten()
    assert (order.diff() <= 1e-6).all(), "the components are dealt in the order of their variance"


def test_fewer_directions_than_components_leave_codes_with_fewer_digits() -> None:
    grey = TRAINING.float().mean((2, 3, 4), keepdim=True)
    ramp = torch.linspace(-9, 9, 32)[:, None, None] * torch.linspace(-1, 1, len(TRAINING))[:, None, None, None, None]
    clips = (grey + ramp).round().clamp(0, 255).to(torch.uint8).expand(-1, -1, 32, 32, 3).contiguous()
    with pytest.raises(ValueError, match="directions, fewer than the 64 codes"):
        Linear.fit("linear-2x8x8-64x1000", clips)
    tokenizer = Linear.fit("linear-2x8x8-2x65536", clips)
    assert all(1 <= len(levels) <= 6 for levels in tokenizer.levels)
    assert psnr_of(clips, tokenizer.decode(tokenizer.encode(clips))).mean() > 25


def test_blocks_of_all_columns_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last of four columns of blocks varies. A quarter of the blocks is used."""
    clips = TRAINING.clone()
    clips[:, :, :, :24] = 0
    monkeypatch.setattr("tokenizer.linear._MOST_BLOCKS", len(TRAINING) * 2 * 4)
    tokenizer = Linear.fit("linear-2x8x8-4x1000", clips)
    assert tokenizer.encode(clips)[:, :, :, 3].unique().numel() > 50


def test_saved_tokenizer_is_loaded_with_the_same_codes_and_fingerprint(linear: Linear, tmp_path: Path) -> None:
    linear.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert isinstance(loaded, Linear) and loaded.levels == linear.levels
    assert loaded.fingerprint() == linear.fingerprint()
    assert torch.equal(loaded.encode(HELD_OUT), linear.encode(HELD_OUT))
    assert Linear.fit(linear.name, TRAINING[:12]).fingerprint() != linear.fingerprint()


@pytest.mark.parametrize(
    ("clips", "name", "reason"),
    [
        (torch.zeros(3, 4, 16, 16, 3, dtype=torch.uint8), "linear-2x8x8-4x1000", "vary in 0 directions.*4 codes"),
        (TRAINING[:1, :2, :16, :8], "linear-2x8x8-4x1000", "vary in 1 directions.*4 codes"),
        (TRAINING[:, :, :30], "linear-2x8x8-4x1000", "height must be a multiple of 8"),
        (TRAINING.float(), "linear-2x8x8-4x1000", "expected uint8"),
        (TRAINING, "linear-2x8x8-65x1000", "up to 64 codes per place"),
        (TRAINING, "linear-2x8x8-4x65537", "vocabularies from 2 to 65536"),
        (TRAINING, "linear-2x64x8-4x1000", "strides up to 32"),
        (TRAINING, "linear-2x8-4x1000", "expected linear-TxHxW"),
    ],
)
def test_clips_and_names_that_do_not_fit_are_refused(clips: Tensor, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Linear.fit(name, clips)


def test_tokenizer_that_was_not_fitted_does_not_encode() -> None:
    with pytest.raises(ValueError, match="has not been fitted"):
        Linear().encode(HELD_OUT)


@pytest.mark.parametrize("digits", [[[8, 5, 5, 6]] * 4, [[8, 5]] * 3, [[8, 1]] * 4, [[2] * 9] * 50])
def test_saved_levels_that_do_not_fit_the_name_are_refused(digits: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="digits"):
        Linear(name="linear-2x8x8-4x1000", digits=digits)
