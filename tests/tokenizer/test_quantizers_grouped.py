"""Several codes per place: quantizers side by side."""

import pytest
import torch

from tokenizer import VQ3D
from tokenizer.quantizers import Grouped, make_quantizer


@pytest.mark.parametrize("kind", ["fsq240", "lfq64", "simvq32", "emavq32"])
def test_each_code_is_that_of_its_quantizer_on_its_channels(kind: str) -> None:
    torch.manual_seed(0)
    grouped = make_quantizer(f"3x{kind}", {})
    assert isinstance(grouped, Grouped) and grouped.codes_per_place == 3
    z = torch.randn(4, 50, grouped.channels)
    grouped.train()(z)  # initialises the codebook of emavq
    quantized, codes, loss = grouped.eval()(z)
    assert codes.shape == (4, 50, 3) and loss == 0 or kind.startswith("simvq")
    size = grouped.channels // 3
    for g, part in enumerate(grouped.parts):
        expected, code, _ = part(z[..., g * size : (g + 1) * size])
        assert torch.equal(codes[..., g], code)
        assert torch.equal(quantized[..., g * size : (g + 1) * size], expected)
    assert torch.allclose(grouped.vectors(codes), quantized, atol=1e-6)


def test_levels_and_codebooks_are_given_per_code() -> None:
    assert make_quantizer("2xfsq240", {}).levels == ((8, 6, 5), (8, 6, 5))
    codebook = make_quantizer("2xsimvq32", {"channels": 4}).codebook()
    assert codebook is not None and codebook.shape == (64, 4)
    assert make_quantizer("2xlfq64", {}).codebook() is None


def test_one_code_is_the_quantizer_itself() -> None:
    """Old names and their weights stay as they were."""
    assert not isinstance(make_quantizer("1xfsq240", {}), Grouped)
    assert make_quantizer("fsq240", {}).state_dict().keys() == make_quantizer("1xfsq240", {}).state_dict().keys()


@pytest.mark.parametrize("name", ["0xfsq240", "65xfsq240", "99xfsq240", "x4fsq240", "4fsq240", "4x4xfsq240"])
def test_invalid_numbers_of_codes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"GxfsqN|at most 64 codes"):
        make_quantizer(name, {})


def test_vq3d_encodes_and_decodes_several_codes() -> None:
    torch.manual_seed(0)
    tokenizer = VQ3D(name="vq3d-2x4x4-3xfsq240", width=8, depth=1).freeze()
    assert (tokenizer.codes_per_place, tokenizer.vocabularies) == (3, (240, 240, 240))
    pixels = torch.randint(256, (2, 40, 8, 12, 3), dtype=torch.uint8)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 20, 2, 3, 3)
    assert torch.equal(torch.cat(list(tokenizer.encode_stream(pixels.split(7, 1))), 1), codes)
    assert tokenizer.decode(codes).shape == pixels.shape
    with pytest.raises(ValueError, match=r"expected integers \(clips, t, h, w, 3\)"):
        tokenizer.decode(codes[..., 0])
    with pytest.raises(ValueError, match="240 codes"):
        tokenizer.decode(codes + 240)
