"""Stems are invertible and keep blocks of pixels separate. Layers have exactly the intended receptive field in time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenizer.blocks import (
    ChannelNorm,
    Haar,
    ResidualBlock,
    TimeConv,
    Upsample,
    depth_to_space,
    haar_matrix,
    space_to_depth,
)

BLOCKS = [(2, 4, 4), (1, 2, 8), (4, 1, 1), (8, 4, 2), (1, 1, 1), (32, 2, 1)]


def video(block: tuple[int, int, int], clips: int = 2) -> Tensor:
    """Return random videos in [-1, 1], (B, 2 * p, 3 * q, 2 * r, 3)."""
    p, q, r = block
    return torch.rand(clips, 2 * p, 3 * q, 2 * r, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def stems(block: tuple[int, int, int]) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    haar = Haar(block)
    return [(lambda x: space_to_depth(x, block), lambda x: depth_to_space(x, block)), (haar, haar.inverse)]


@pytest.mark.parametrize("block", [*BLOCKS, (3, 5, 2)])
def test_space_to_depth_packs_the_pixels_of_a_block_and_is_invertible(block: tuple[int, int, int]) -> None:
    clip = video(block)
    packed = space_to_depth(clip, block)
    p, q, r = block
    assert packed.shape == (2, 3 * p * q * r, 2, 3, 2)
    assert torch.equal(depth_to_space(packed, block), clip)
    assert torch.equal(packed[1, :, -1, -1, 0].sort().values, clip[1, -p:, -q:, :r].flatten().sort().values)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_the_haar_matrix_is_orthonormal_with_the_mean_first_and_the_finest_last(size: int) -> None:
    matrix = haar_matrix(size)
    assert matrix.shape == (size, size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-6)
    assert torch.allclose(matrix[0], torch.full((size,), size**-0.5))
    assert torch.allclose(matrix[1:].sum(1), torch.zeros(size - 1), atol=1e-6)
    # Number of samples that each detail spans: all, then twice one half, then four times one quarter, ...
    widths = (matrix != 0).sum(1)[1:]
    assert widths.tolist() == sorted(widths.tolist(), reverse=True)
    if size > 1:
        assert widths[-1] == 2 and matrix[-1, -2:].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])


@pytest.mark.parametrize("block", BLOCKS)
def test_haar_is_invertible_and_keeps_the_energy(block: tuple[int, int, int]) -> None:
    clip, haar = video(block), Haar(block)
    coefficients = haar(clip)
    p, q, r = block
    assert coefficients.shape == (2, 3 * p * q * r, 2, 3, 2)
    assert (haar.inverse(coefficients) - clip).abs().max() < 1e-6
    assert coefficients.square().sum().item() == pytest.approx(clip.square().sum().item(), rel=1e-5)
    mean = clip[1, :p, -q:, :r].mean((0, 1, 2)) * (p * q * r) ** 0.5
    assert torch.allclose(coefficients[1, :3, 0, -1, 0], mean, atol=1e-5)


def test_haar_runs_in_fp32_under_autocast() -> None:
    clip, haar = video((2, 4, 4)), Haar((2, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = haar(clip)
        again = haar.inverse(coefficients)
    assert torch.equal(coefficients, haar(clip)) and (again - clip).abs().max() < 1e-6


def test_haar_of_a_flat_clip_has_means_and_no_details() -> None:
    haar = Haar((2, 4, 4))
    flat = torch.ones(1, 4, 8, 8, 3) * torch.tensor([0.1, -0.2, 0.3])
    coefficients = haar(flat)
    assert torch.allclose(coefficients[0, :3, 0, 0, 0], torch.tensor([0.1, -0.2, 0.3]) * 32**0.5)
    assert coefficients[:, 3:].abs().max() < 1e-6
    assert not list(haar.parameters()) and not haar.state_dict()


@pytest.mark.parametrize("block", BLOCKS)
def test_stems_do_not_mix_blocks(block: tuple[int, int, int]) -> None:
    clip = video(block, 1)
    p, q, r = block
    for forward, backward in stems(block):
        before = forward(clip)
        changed = clip.clone()
        changed[:, :p, q : 2 * q, r:] += 1
        touched = (forward(changed) != before).any(1)[0]
        assert touched.nonzero().tolist() == [[0, 1, 1]]
        other = before.clone()
        other[:, :, 1, 2, 0] += 1
        pixels = (backward(other) != backward(before)).any(-1)[0].nonzero()
        assert pixels.amin(0).tolist() == [p, 2 * q, 0] and pixels.amax(0).tolist() == [2 * p - 1, 3 * q - 1, r - 1]


def reach(layer: Callable[[Tensor], Tensor], channels: int, place: int, axis: int) -> list[int]:
    """Return the output positions along an axis that change with one input position."""
    x = torch.randn(1, channels, 9, 8, 8, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed.select(axis, place).add_(torch.randn(1, channels, 1, 1, generator=torch.Generator().manual_seed(2)))
    different = (layer(changed) != layer(x)).transpose(axis, 0).flatten(1).any(1)
    return different.nonzero().flatten().tolist()


@torch.no_grad()
def drawn(layer: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all parameters, since some are initialised to zero."""
    for p in layer.parameters():
        p.add_(torch.randn_like(p) * 0.3)
    return layer


@pytest.mark.parametrize("make", [TimeConv, ResidualBlock])
def test_causal_layers_reach_two_positions_back_and_others_one_in_both_directions(make: type) -> None:
    torch.manual_seed(0)
    for causal, around in ((True, (0, 1, 2)), (False, (-1, 0, 1))):
        layer = drawn(make(4, causal=causal))
        for place in range(9):
            expected = [place + d for d in around if 0 <= place + d < 9]
            assert reach(layer, 4, place, axis=2) == expected
        x = torch.randn(2, 4, 1, 3, 3)
        assert layer(x).shape == x.shape


def test_the_first_outputs_of_a_causal_layer_do_not_depend_on_the_length() -> None:
    layer = drawn(TimeConv(4, causal=True))
    x = torch.randn(1, 4, 9, 3, 3)
    for length in range(1, 10):
        assert torch.allclose(layer(x[:, :, :length]), layer(x)[:, :, :length], atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_gradients_of_short_clips_in_bf16_are_those_in_fp32(causal: bool, length: int) -> None:
    """With padding inside the convolution, oneDNN (torch 2.13, avx512_bf16) leaves parts of the gradient unwritten."""
    torch.manual_seed(0)
    layer = TimeConv(16, causal=causal).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = torch.randn(4, 16, length, 8, 8).contiguous(memory_format=torch.channels_last_3d)

    def gradient(bf16: bool) -> Tensor:
        layer.weight.grad = None
        # Freed memory full of NaN, which the gradient may reuse.
        torch.full((layer.weight.numel() * 4,), torch.nan)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            layer(x).float().square().sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    exact = gradient(False)
    for _ in range(5):
        assert (gradient(True) - exact).norm() < 0.02 * exact.norm()


def test_a_residual_block_is_initially_the_identity_and_has_gradients() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, causal=False)
    x = torch.randn(2, 8, 3, 4, 4)
    assert torch.equal(block(x), x)
    block(x).square().mean().backward()
    assert block.time.weight.grad.abs().max() > 0  # type: ignore[union-attr]


def test_norms_do_not_mix_positions() -> None:
    norm = drawn(ChannelNorm(8))
    assert reach(norm, 8, 4, axis=2) == reach(norm, 8, 4, axis=3) == reach(norm, 8, 4, axis=4) == [4]
    plain = ChannelNorm(8)(torch.randn(2, 8, 3, 4, 4) * 5 + 3)
    assert torch.allclose(plain.mean(1), torch.zeros(2, 3, 4, 4), atol=1e-5)
    assert torch.allclose(plain.var(1, unbiased=False), torch.ones(2, 3, 4, 4), atol=1e-3)


def test_upsampling_turns_each_position_into_four() -> None:
    up = drawn(Upsample(6, 3))
    assert up(torch.randn(2, 6, 3, 4, 5)).shape == (2, 3, 3, 8, 10)
    assert reach(up, 6, 3, axis=2) == [3]
    assert reach(up, 6, 3, axis=3) == reach(up, 6, 3, axis=4) == [6, 7]
