"""Every attention kernel equals the dense reference, forward and backward, for every mask that the models use; rotary
positions let scores depend on differences of positions only."""

import math
import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ar_model.attention import (
    BACKENDS,
    Attention,
    BlockMask,
    Mask,
    Rotation,
    fastest_backend,
    reference,
    set_backend,
)
from ar_model.transformer import rotary_angles

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Kernel = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
KERNELS = [
    pytest.param("plain", "cpu"),
    pytest.param("sdpa", "cpu"),
    *(
        pytest.param(
            name,
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
        )
        for name in BACKENDS
    ),
]


def cases(number: int = 50) -> list[tuple[Mask, int, int]]:
    """Masks with lengths of queries and keys between 1 and 513."""
    draw = random.Random(0)
    found: list[tuple[Mask, int, int]] = [
        (None, 1, 1),
        (None, 513, 513),
        (None, 1, 513),
        (BlockMask(1, 1, 1), 1, 1),
        (BlockMask(513, 1, 1), 513, 513),
        (BlockMask(57, 9, 2), 513, 114),
        (BlockMask(7, 1, 73), 7, 511),
    ]
    while len(found) < number:
        if draw.random() < 0.3:
            found.append((None, draw.randint(1, 513), draw.randint(1, 513)))
        else:
            blocks = int(math.exp(draw.uniform(0, math.log(513))))
            queries, keys = draw.randint(1, 513 // blocks), draw.randint(1, 513 // blocks)
            found.append((BlockMask(blocks, queries, keys), blocks * queries, blocks * keys))
    return found


def with_gradients(kernel: Kernel, inputs: list[Tensor], mask: Mask, upstream: Tensor) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = kernel(leaves[0], leaves[1], leaves[2], mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, device", KERNELS)
def test_kernel_equals_the_reference_forward_and_backward(name: str, device: str, dtype: torch.dtype) -> None:
    if name == "xformers":
        pytest.importorskip("xformers")
    generator = torch.Generator().manual_seed(1)
    for mask, queries, keys in cases():
        batch, heads, width = 1 + queries % 2, 1 + keys % 3, (8, 16, 32)[queries % 3]

        def draw(length: int, shape: tuple[int, int, int] = (batch, heads, width)) -> Tensor:
            return torch.randn(*shape[:2], length, shape[2], generator=generator).to(device, dtype)

        inputs, upstream = [draw(queries), draw(keys), draw(keys)], draw(queries)
        truth = with_gradients(reference, [x.float() for x in inputs], mask, upstream.float())
        found = with_gradients(BACKENDS[name], inputs, mask, upstream)
        for what, expected, got in zip(("out", "dq", "dk", "dv"), truth, found, strict=True):
            assert got.dtype == dtype and got.shape == expected.shape
            # A query that sees a single key has no gradient: its rounding errors are measured by what came in.
            floor = upstream.float().norm() if keys == 1 else 0.0
            error = (got.float() - expected).norm() / max(expected.norm(), floor)
            assert error <= TOLERANCE[dtype], f"{what} of {mask}, {queries} x {keys}: {float(error):.2e}"


def test_the_reference_is_a_softmax_of_scaled_scores_over_visible_keys() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = reference(q, k, v, BlockMask(3, 2, 2))
    for i in range(6):
        sees = 2 * (i // 2 + 1)
        weight = torch.exp(q[0, 0, i] @ k[0, 0, :sees].T / 2)
        assert torch.allclose(out[0, 0, i], weight @ v[0, 0, :sees] / weight.sum(), atol=1e-6)


@pytest.mark.parametrize("mask", [BlockMask(1, 1, 1), BlockMask(4, 1, 1), BlockMask(3, 2, 5), BlockMask(5, 3, 1)])
def test_a_query_sees_the_runs_up_to_its_own(mask: BlockMask) -> None:
    visible = mask.visible(torch.device("cpu"))
    assert visible.dtype == torch.bool
    assert visible.tolist() == [
        [k // mask.keys <= q // mask.queries for k in range(mask.blocks * mask.keys)]
        for q in range(mask.blocks * mask.queries)
    ]


@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_a_mask_first_used_in_inference_mode_serves_training_afterwards(name: str) -> None:
    mask = BlockMask(3, 7, 5) if name == "plain" else BlockMask(5, 3, 7)
    q, k = torch.randn(1, 1, mask.blocks * mask.queries, 4), torch.randn(1, 1, mask.blocks * mask.keys, 4)
    with torch.inference_mode():
        before = BACKENDS[name](q, k, k, mask).clone()
    out, *gradients = with_gradients(BACKENDS[name], [q, k, k], mask, torch.ones_like(q))
    assert torch.allclose(out, before, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_xformers_on_a_cpu_is_refused() -> None:
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="CUDA"):
        BACKENDS["xformers"](x, x, x, None)


def test_set_backend_refuses_an_unknown_name_and_lists_those_that_exist() -> None:
    layer = Attention(8, 2)
    before = layer.backend
    with pytest.raises(ValueError, match="flash9.*plain.*sdpa.*xformers"):
        set_backend(layer, "flash9")
    assert layer.backend == before


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
def test_the_layer_gives_the_same_with_every_backend(name: str) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 2)
    x, context, mask = torch.randn(2, 6, 12), torch.randn(2, 9, 12), BlockMask(3, 2, 3)
    rotation, other = Rotation.of(torch.randn(2, 6, 3)), Rotation.of(torch.randn(2, 9, 3))
    set_backend(layer, name)
    found = layer(x, context, mask, rotation, other)
    q = rotation.apply(layer.q(x).unflatten(-1, (2, 6)).transpose(1, 2))
    k, v = (y.unflatten(-1, (2, 6)).transpose(1, 2) for y in layer.kv(context).chunk(2, dim=-1))
    expected = layer.out(reference(q, other.apply(k), v, mask).transpose(1, 2).flatten(2))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("width, heads", [(8, 3), (6, 2), (4, 4)])
def test_a_width_that_heads_cannot_share_evenly_is_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"{width}.*{heads}"):
        Attention(width, heads)


def test_fastest_backend_drops_gradients_and_names_one_that_runs_here() -> None:
    layer, x = Attention(8, 2), torch.randn(1, 4, 8)
    name = fastest_backend(layer, lambda: layer(x).square().sum(), torch.device("cpu"))
    assert name in ("plain", "sdpa")
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("slow, fast", [("plain", "sdpa"), ("sdpa", "plain")])
def test_fastest_backend_names_the_faster(monkeypatch: pytest.MonkeyPatch, slow: str, fast: str) -> None:
    def sluggish(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        time.sleep(0.03)
        return reference(q, k, v, mask)

    monkeypatch.setitem(BACKENDS, slow, sluggish)
    layer, x = Attention(8, 2), torch.randn(1, 4, 8)
    assert fastest_backend(layer, lambda: layer(x).sum(), torch.device("cpu")) == fast


@pytest.mark.parametrize("error", [ImportError, NotImplementedError, ValueError])
def test_fastest_backend_passes_over_a_kernel_that_does_not_run(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        raise error("no kernel")

    monkeypatch.setitem(BACKENDS, "plain", broken)
    layer, x = Attention(8, 2), torch.randn(1, 4, 8)
    assert fastest_backend(layer, lambda: layer(x).sum(), torch.device("cpu")) == "sdpa"
    assert all(p.grad is None for p in layer.parameters())


def test_rotation_makes_scores_depend_on_differences_of_positions_only() -> None:
    grid, width = (4, 5, 6), 12
    angles = rotary_angles(grid, width)
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    q, k = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).unbind(0)
    rotation = Rotation.of(angles[None])
    turned_q, turned_k = (rotation.apply(x.expand(1, 1, len(places), width))[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    by_offset: dict[tuple[int, ...], list[float]] = {}
    for i, row in enumerate((places[:, None] - places[None]).tolist()):
        for j, offset in enumerate(row):
            by_offset.setdefault(tuple(offset), []).append(float(scores[i, j]))
    assert max(max(same) - min(same) for same in by_offset.values()) < 1e-4
    assert abs(by_offset[0, 0, 0][0] - float(q @ k)) < 1e-4
    neighbours = [by_offset[step][0] for step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]]
    assert min(abs(a - b) for i, a in enumerate(neighbours) for b in neighbours[:i]) > 1e-2


def test_rotation_preserves_norms_and_types() -> None:
    rotation = Rotation.of(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 3)
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rotation.apply(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(rotation.apply(x), x, atol=0.1)
    assert rotation.apply(x.bfloat16()).dtype == torch.bfloat16


def test_rotation_by_angle_zero_changes_nothing() -> None:
    x = torch.randn(1, 2, 3, 8)
    assert torch.equal(Rotation.of(torch.zeros(1, 3, 4)).apply(x), x)
