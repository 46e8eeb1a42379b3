"""The linear tokenizer: exact codes, best levels, one-line refusals."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer import Linear, load_tokenizer
from tokenizer.levels import Scalars, allocate
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
    names = ["linear-2x8x8-1000", "linear-2x8x8-4x1000", "linear-2x8x8-16x1000", "linear-2x8x8-64x65536"]
    tokenizers = [Linear.fit(name, TRAINING) for name in names]
    quality = [psnr_of(HELD_OUT, t.decode(t.encode(HELD_OUT))).mean().item() for t in tokenizers]
    assert quality == sorted(quality) and quality[-1] > quality[0] + 10
    assert torch.equal(tokenizers[1].encode(HELD_OUT), linear.encode(HELD_OUT)), (
        "the fit is a function of its arguments"
    )


def test_one_code_per_place_has_no_axis_of_codes() -> None:
    codes = Linear.fit("linear-2x8x8-1000", TRAINING).encode(HELD_OUT)
    assert codes.shape == (6, 2, 4, 4)


def test_decoding_is_the_least_squares_reconstruction_from_the_centres(linear: Linear) -> None:
    """No other pixels for a code are closer, on average, to the blocks of the training clips that have the code."""
    codes, decoded = linear.encode(TRAINING), linear.decode(linear.encode(TRAINING))
    assert torch.equal(linear.decode(codes[:3]), decoded[:3])
    error = TRAINING.double() - decoded.double()
    assert abs(error.mean().item()) < 0.5, "the mean is kept"


def test_levels_are_nearly_the_best_of_all_for_a_small_vocabulary() -> None:
    values = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values *= torch.tensor([4.0, 2.0, 0.5])
    scalars = Scalars(values)
    (chosen,) = allocate(scalars, 1, 48)
    counts = dict(chosen)

    deviations = [error**0.5 for error in scalars.error(1)]

    def error(levels: tuple[int, ...]) -> float:
        return sum(scalars.error(count)[i] / deviations[i] for i, count in enumerate(levels))

    best = min(error(levels) for levels in itertools.product(range(1, 21), repeat=3) if np.prod(levels) <= 48)
    assert error(tuple(counts.get(component, 1) for component in range(3))) <= 1.15 * best


def test_levels_of_a_component_are_those_of_lloyd() -> None:
    """The optimal quantizer of a normal variable with four levels (Max 1960): centres .4528 and 1.510, error .1175."""
    values = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scalars = Scalars(values)
    centres, thresholds = scalars.levels(0, 4)
    assert centres.tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=0.03)
    assert thresholds.tolist() == pytest.approx([-0.9816, 0, 0.9816], abs=0.03)
    assert scalars.error(4)[0] / 2**14 == pytest.approx(0.1175, abs=0.004)


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
