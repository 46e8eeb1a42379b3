"""Attention layers give equal results with every backend, also in autocast. Rotary scores depend on relative positions only."""

import pytest
import torch
from torch import Tensor, nn

from ar_model.attention import Attention, Rotation, set_backend
from ar_model.attention_mask import BlockMask, Mask
from ar_model.backends import BACKENDS, reference
from ar_model.transformer import rotary_angles


def test_set_backend_refuses_an_unknown_name_and_lists_the_valid_ones() -> None:
    layer = Attention(8, 2)
    before = layer.kernel.backend
    with pytest.raises(ValueError, match="plain, sdpa, xformers, flex, .*'flash9'"):
        set_backend(layer, "flash9")
    assert layer.kernel.backend == before


def test_set_backend_reaches_every_attention_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Attention(8, 2), nn.Sequential(nn.Linear(8, 8), Attention(8, 4)))
    calls = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        calls.append(q.shape[1])
        return reference(q, k, v, mask)

    monkeypatch.setitem(BACKENDS, "plain", spy)
    set_backend(model, "plain")
    model(torch.randn(2, 3, 8))
    assert calls == [2, 4]
    set_backend(model, "sdpa")
    model(torch.randn(2, 3, 8))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_the_layer_equals_the_reference_with_every_backend(name: str) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 2)
    x, context, mask = torch.randn(2, 6, 12), torch.randn(2, 9, 12), BlockMask(3, 2, 3)
    rotation, other = Rotation.from_angles(torch.randn(2, 6, 3)), Rotation.from_angles(torch.randn(2, 9, 3))
    set_backend(layer, name)
    out = layer(x, context, mask, rotation, other)
    q = rotation.apply(layer.q(x).unflatten(-1, (2, 6)).transpose(1, 2))
    k, v = (y.unflatten(-1, (2, 6)).transpose(1, 2) for y in layer.kv(context).chunk(2, dim=-1))
    expected = layer.out(reference(q, other.apply(k), v, mask).transpose(1, 2).flatten(2))
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("mask", [BlockMask(5, 6, 9), None], ids=["blocks", "all"])
@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_under_autocast_the_layer_equals_the_reference_within_bf16_precision(name: str, mask: Mask) -> None:
    """The backward pass may also run inside autocast, as in `try_backends`."""
    torch.manual_seed(0)
    layer, x, context = Attention(48, 3), torch.randn(2, 30, 48), torch.randn(2, 45, 48)
    rotation, other = Rotation.from_angles(torch.randn(2, 30, 8)), Rotation.from_angles(torch.randn(2, 45, 8))
    upstream = torch.randn(2, 30, 48)
    leaves = [x.requires_grad_(), context.requires_grad_(), *layer.parameters()]
    set_backend(layer, "reference")
    out = layer(x, context, mask, rotation, other)
    expected = [out, *torch.autograd.grad(out, leaves, upstream)]
    set_backend(layer, name)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, context, mask, rotation, other)
        inside = torch.autograd.grad(out, leaves, upstream.bfloat16(), retain_graph=True)
    outside = torch.autograd.grad(out, leaves, upstream.bfloat16())
    assert out.dtype == torch.bfloat16
    for gradients in (inside, outside):
        for correct, result in zip(expected, [out.float(), *gradients], strict=True):
            assert result.dtype == torch.float32
            assert (result - correct).norm() <= 2e-2 * correct.norm()


@pytest.mark.parametrize("width, heads", [(8, 3), (6, 2), (4, 4)])
def test_a_width_that_does_not_split_into_heads_is_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"{width}.*{heads}"):
        Attention(width, heads)


def test_rotary_scores_depend_on_relative_positions_only() -> None:
    grid, width = (4, 5, 6), 12
    angles = rotary_angles(grid, width)
    positions = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    q, k = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).unbind(0)
    rotation = Rotation.from_angles(angles[None])
    rotated_q, rotated_k = (rotation.apply(x.expand(1, 1, len(positions), width))[0, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    by_offset: dict[tuple[int, ...], list[float]] = {}
    for i, row in enumerate((positions[:, None] - positions[None]).tolist()):
        for j, offset in enumerate(row):
            by_offset.setdefault(tuple(offset), []).append(float(scores[i, j]))
    assert max(max(same) - min(same) for same in by_offset.values()) < 1e-4
    assert abs(by_offset[0, 0, 0][0] - float(q @ k)) < 1e-4
    neighbours = [by_offset[step][0] for step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]]
    assert min(abs(a - b) for i, a in enumerate(neighbours) for b in neighbours[:i]) > 1e-2


def test_rotation_preserves_norms_and_dtypes() -> None:
    rotation = Rotation.from_angles(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 3)
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rotation.apply(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(rotation.apply(x), x, atol=0.1)
    assert rotation.apply(x.bfloat16()).dtype == torch.bfloat16


def test_rotation_by_angle_zero_changes_nothing() -> None:
    x = torch.randn(1, 2, 3, 8)
    assert torch.equal(Rotation.from_angles(torch.zeros(1, 3, 4)).apply(x), x)
