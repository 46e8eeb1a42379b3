"""What a tokenizer's training reports is what it says: decibels of a known error, use and perplexity of known counts."""

import math

import pytest
import torch

from tokenizer import VQ3D
from tokenizer.losses import Reconstruction, code_health, psnr


@pytest.mark.parametrize("error, decibels", [(4.0, 0.0), (0.04, 20.0), (4e-4, 40.0), ((1 / 127.5) ** 2, 48.1308)])
def test_psnr_of_a_known_error(error: float, decibels: float) -> None:
    """The last one: every pixel is one grey level of 255 off."""
    assert psnr(torch.tensor(error)).item() == pytest.approx(decibels, abs=1e-3)


def test_psnr_of_a_perfect_copy_is_finite() -> None:
    assert 100 < psnr(torch.tensor(0.0)).item() < math.inf


@pytest.mark.parametrize("vocab", [1, 2, 1000])
def test_uniform_codes_have_the_perplexity_of_the_vocabulary(vocab: int) -> None:
    health = code_health(torch.full((vocab,), 7))
    assert health["perplexity"].item() == pytest.approx(vocab)
    assert health["code_usage"].item() == 1.0


def test_a_single_code_has_perplexity_one() -> None:
    health = code_health(torch.tensor([0, 0, 31, 0, 0]))
    assert health["perplexity"].item() == pytest.approx(1.0)
    assert health["code_usage"].item() == pytest.approx(0.2)


def test_perplexity_of_uneven_counts_is_the_exponential_of_their_entropy() -> None:
    health = code_health(torch.tensor([2, 1, 1, 0]))
    assert health["perplexity"].item() == pytest.approx(2**1.5)
    assert health["code_usage"].item() == pytest.approx(0.75)


def test_no_codes_at_all_use_nothing_and_stay_finite() -> None:
    health = code_health(torch.zeros(5, dtype=torch.long))
    assert health["code_usage"].item() == 0.0
    assert math.isfinite(health["perplexity"].item())


def test_counts_too_large_for_fp32_are_counted_exactly() -> None:
    health = code_health(torch.tensor([2**40, 2**40, 1]))
    assert health["perplexity"].item() == pytest.approx(2.0, abs=1e-6)
    assert health["code_usage"].item() == 1.0


@pytest.mark.parametrize("quantizer", ["fsq", "ema-vq"])
def test_the_training_loss_is_the_squared_error_plus_the_quantizers_own(quantizer: str) -> None:
    torch.manual_seed(0)
    tokenizer = VQ3D(
        stride=(2, 4, 4),
        width=8,
        depth=1,
        quantizer=quantizer,  # type: ignore[arg-type]
        levels=(5, 3),
        codebook_size=16,
        codebook_channels=4,
    )
    pixels = torch.randint(0, 256, (4, 4, 8, 8, 3), dtype=torch.uint8)
    tokenizer(pixels.float() / 127.5 - 1)  # starts a learned codebook
    tokenizer.eval()
    tokenizer.quantizer.train(quantizer == "ema-vq")  # whose commitment counts in training only
    torch.manual_seed(1)
    kept = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    found = Reconstruction(tokenizer)({"pixels_BTHWC": pixels, "real_B": torch.ones(len(pixels), dtype=torch.bool)})
    assert found["loss"].requires_grad and not found["psnr"].requires_grad
    found["loss"].backward()
    assert tokenizer.encoder[0].weight.grad.abs().max() > 0
    tokenizer.load_state_dict(kept)
    torch.manual_seed(1)
    out = tokenizer(pixels.float() / 127.5 - 1)
    error = (out["video"] - (pixels.float() / 127.5 - 1)).square().mean()
    assert found["loss"].item() == pytest.approx((error + out["quantizer"]).item(), rel=1e-5)
    assert (out["quantizer"].item() > 0) == (quantizer == "ema-vq")
    assert found["psnr"].item() == pytest.approx(10 * math.log10(4 / error.item()), abs=1e-3)
    assert found["code_usage"].item() == pytest.approx(len(out["codes"].unique()) / tokenizer.vocab_size)


def test_pixels_in_another_range_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        Reconstruction(VQ3D(width=8, depth=1))(
            {"pixels_BTHWC": torch.rand(1, 2, 8, 8, 3), "real_B": torch.ones(1, dtype=torch.bool)}
        )


def test_places_of_damaged_videos_do_not_count() -> None:
    torch.manual_seed(0)
    loss = Reconstruction(VQ3D(width=8, depth=1))
    pixels = torch.randint(256, (3, 2, 8, 8, 3), dtype=torch.uint8)
    real = torch.tensor([True, False, True])
    whole = loss({"pixels_BTHWC": pixels[real], "real_B": real[real]})
    holed = loss({"pixels_BTHWC": pixels * real[:, None, None, None, None], "real_B": real})
    assert torch.allclose(whole["loss"], holed["loss"])
    assert whole["code_usage"] == holed["code_usage"]
    assert loss({"pixels_BTHWC": pixels, "real_B": ~real & real})["loss"] == 0
