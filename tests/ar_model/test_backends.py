"""Every attention kernel equals the dense reference, forward and backward, for every mask that the models use."""

import math
import random
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ar_model import backends
from ar_model.attention_mask import BlockMask, Mask
from ar_model.backends import BACKENDS, MAX_PIECES, reference

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


def mask_cases(count: int = 50) -> list[tuple[Mask, int, int]]:
    """Return masks with their numbers of queries and keys, between 1 and 513."""
    draw = random.Random(0)
    cases: list[tuple[Mask, int, int]] = [
        (None, 1, 1),
        (None, 513, 513),
        (None, 1, 513),
        (BlockMask(1, 1, 1), 1, 1),
        (BlockMask(513, 1, 1), 513, 513),
        (BlockMask(57, 9, 2), 513, 114),
        (BlockMask(7, 1, 73), 7, 511),
    ]
    while len(cases) < count:
        if draw.random() < 0.3:
            cases.append((None, draw.randint(1, 513), draw.randint(1, 513)))
        else:
            blocks = int(math.exp(draw.uniform(0, math.log(513))))
            queries, keys = draw.randint(1, 513 // blocks), draw.randint(1, 513 // blocks)
            cases.append((BlockMask(blocks, queries, keys), blocks * queries, blocks * keys))
    return cases


FLEX_CASES: list[tuple[Mask, int, int]] = [
    (BlockMask(15, 25, 20), 375, 300),
    (BlockMask(57, 9, 2), 513, 114),
    (None, 513, 513),
]


def contiguous(heads: int, kernel: Kernel, x: Tensor, context: Tensor, mask: Mask) -> Tensor:
    q, k, v = split(heads, x, context)
    return kernel(q.contiguous(), k.contiguous(), v.contiguous(), mask)


def as_in_the_layer(heads: int, kernel: Kernel, x: Tensor, context: Tensor, mask: Mask) -> Tensor:
    return kernel(*split(heads, x, context), mask)


def split(heads: int, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as views of x (B, Q, N * H) and context (B, K, 2 * N * H), as the layer does."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (x, *context.chunk(2, dim=-1)))
    return q, k, v


def with_gradients(run: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x, keys and values."""
    x, context = (x.clone().requires_grad_() for x in inputs)
    out = run(x, context)
    assert out.shape == upstream.shape and out.dtype == upstream.dtype
    dx, dcontext = torch.autograd.grad(out, [x, context], upstream)
    return [out.detach(), dx, *dcontext.chunk(2, dim=-1)]


def assert_close(results: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.allclose(x, correct, atol=1e-5) for x, correct in zip(results, expected, strict=True))


@pytest.mark.parametrize("layout", [contiguous, as_in_the_layer], ids=["contiguous", "as in the layer"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, device", KERNELS)
def test_kernel_equals_the_reference_forward_and_backward(
    name: str, device: str, dtype: torch.dtype, layout: Callable[..., Tensor]
) -> None:
    # An import of xformers itself would fail for good where its CUDA runtime has to be loaded first.
    if name == "xformers" and find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    if name == "flex":
        pytest.importorskip("triton", reason="FlexAttention is compiled by Triton, which is not installed")
    generator = torch.Generator().manual_seed(1)
    # flex compiles every shape, so fewer cases are tested.
    for mask, queries, keys in mask_cases(12 if name == "flex" else 50):
        batch, heads, width = 1 + queries % 2, 1 + keys % 3, (16, 32, 8)[queries % (2 if device == "cuda" else 3)]

        def draw(length: int, channels: int, batch: int = batch) -> Tensor:
            return torch.randn(batch, length, channels, generator=generator).to(device, dtype)

        inputs = [draw(queries, heads * width), draw(keys, 2 * heads * width)]
        upstream = draw(queries, heads * width).unflatten(-1, (heads, -1)).transpose(1, 2)
        run_reference = partial(layout, heads, reference, mask=mask)
        expected = with_gradients(run_reference, [x.float() for x in inputs], upstream.float())
        results = with_gradients(partial(layout, heads, BACKENDS[name], mask=mask), inputs, upstream)
        for part, correct, result in zip(("out", "dq", "dk", "dv"), expected, results, strict=True):
            assert result.dtype == dtype and result.shape == correct.shape
            # With a single key, queries and keys have zero gradients, so rounding errors are relative to the upstream gradient.
            floor = upstream.float().norm() if keys == 1 else 0.0
            error = (result.float() - correct).norm() / max(correct.norm(), floor)
            assert error <= TOLERANCE[dtype], f"{part} of {mask}, {queries} x {keys}: {float(error):.2e}"


@pytest.mark.parametrize("pieces", [1, 2, 3, MAX_PIECES, 7, 100])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17])
def test_plain_equals_the_reference_with_fewer_and_more_blocks_than_pieces(
    monkeypatch: pytest.MonkeyPatch, blocks: int, pieces: int
) -> None:
    monkeypatch.setattr(backends, "MAX_PIECES", pieces)
    generator = torch.Generator().manual_seed(blocks)
    for queries, keys in [(3, 2), (1, 4), (5, 1)]:
        mask = BlockMask(blocks, queries, keys)
        inputs = [torch.randn(2, blocks * n, c, generator=generator) for n, c in ((queries, 8), (keys, 16))]
        upstream = torch.randn(2, 2, blocks * queries, 4, generator=generator)
        expected, results = (
            with_gradients(partial(as_in_the_layer, 2, kernel, mask=mask), inputs, upstream)
            for kernel in (reference, BACKENDS["plain"])
        )
        assert_close(results, expected)


@pytest.mark.parametrize("tile", [1, 300, 2000])
@pytest.mark.parametrize("mask", [None, BlockMask(1, 13, 9), BlockMask(5, 3, 2), BlockMask(9, 1, 4)])
def test_plain_equals_the_reference_when_weights_are_recomputed_in_tiles(
    monkeypatch: pytest.MonkeyPatch, mask: Mask, tile: int
) -> None:
    queries, keys = (13, 9) if mask is None else (mask.blocks * mask.queries, mask.blocks * mask.keys)
    generator = torch.Generator().manual_seed(tile)
    inputs = [torch.randn(3, n, c, generator=generator) for n, c in ((queries, 8), (keys, 16))]
    upstream = torch.randn(3, 2, queries, 4, generator=generator)
    expected = with_gradients(partial(as_in_the_layer, 2, reference, mask=mask), inputs, upstream)
    monkeypatch.setattr(backends, "TILE_BYTES", tile)
    for max_saved in (backends.MAX_SAVED_BYTES, 0):
        monkeypatch.setattr(backends, "MAX_SAVED_BYTES", max_saved)
        assert_close(
            with_gradients(partial(as_in_the_layer, 2, BACKENDS["plain"], mask=mask), inputs, upstream), expected
        )


@pytest.mark.parametrize("name", ["plain", "sdpa"])
@pytest.mark.parametrize("mask, queries", [(BlockMask(15, 20, 20), 300), (BlockMask(15, 40, 20), 600), (None, 200)])
@pytest.mark.parametrize("max_saved", [backends.MAX_SAVED_BYTES, 0], ids=["saved", "recomputed"])
def test_sharp_attention_in_bf16_is_as_exact_as_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str, mask: Mask, queries: int, max_saved: int
) -> None:
    """Scores have a standard deviation of 8. The reference is computed in fp64 from the same bf16 inputs."""
    monkeypatch.setattr(backends, "MAX_SAVED_BYTES", max_saved)
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, 300, 300, queries)
    q, k, v, upstream = (torch.randn(2, 4, n, 64, generator=generator) for n in lengths)

    def run(kernel: Kernel, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in (8 * q, k, v)]
        out = kernel(*inputs, mask)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream.bfloat16().to(dtype))]

    def exact(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 8
        if mask is not None:
            scores = scores.masked_fill(~mask.visible(scores.device), -torch.inf)
        return scores.softmax(-1) @ v

    expected, results = run(exact, torch.float64), run(BACKENDS[name], torch.bfloat16)
    for part, correct, result in zip(("out", "dq", "dk", "dv"), expected, results, strict=True):
        error = float((result.double() - correct).norm() / correct.norm())
        assert error <= 0.6e-2, f"{part}: {error:.1e}"


def test_plain_saves_no_weights_of_large_inputs() -> None:
    """The attention weights of 48 heads of 1,000 tokens take 92 MiB in bf16. Only queries, keys and values are saved."""
    q, k, v = (torch.randn(4, 12, 1000, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    saved: list[int] = []

    def save(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        BACKENDS["plain"](q, k, v, None)
    assert sum(saved) == 3 * q.numel()


class ScoreCounter(TorchDispatchMode):
    """Counts the attention scores that are computed."""

    scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.baddbmm:
            self.scores += out.numel()
        return out


@pytest.mark.parametrize("blocks, share", [(1, 1), (2, 3 / 4), (4, 10 / 16), (8, 10 / 16), (40, 10 / 16), (5, 17 / 25)])
def test_plain_skips_keys_that_no_query_of_a_piece_sees(blocks: int, share: float) -> None:
    """With four pieces, 63 % of the scores are computed. Five blocks are split into pieces of one, two and two blocks."""
    x = torch.randn(1, 1, 40, 4)
    with ScoreCounter() as counter:
        BACKENDS["plain"](x, x, x, BlockMask(blocks, 40 // blocks, 40 // blocks))
    assert counter.scores == round(share * 40**2)


def test_the_reference_is_a_softmax_of_scaled_scores_over_visible_keys() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = reference(q, k, v, BlockMask(3, 2, 2))
    for i in range(6):
        visible = 2 * (i // 2 + 1)
        weight = torch.exp(q[0, 0, i] @ k[0, 0, :visible].T / 2)
        assert torch.allclose(out[0, 0, i], weight @ v[0, 0, :visible] / weight.sum(), atol=1e-6)


@pytest.mark.parametrize("mask", [BlockMask(1, 1, 1), BlockMask(4, 1, 1), BlockMask(3, 2, 5), BlockMask(5, 3, 1)])
def test_a_query_sees_the_blocks_up_to_its_own(mask: BlockMask) -> None:
    visible = mask.visible(torch.device("cpu"))
    assert visible.dtype == torch.bool
    assert visible.tolist() == [
        [k // mask.keys <= q // mask.queries for k in range(mask.blocks * mask.keys)]
        for q in range(mask.blocks * mask.queries)
    ]


@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_a_mask_cached_in_inference_mode_works_in_training(name: str) -> None:
    mask = BlockMask(3, 7, 5) if name == "plain" else BlockMask(5, 3, 7)
    q, k = torch.randn(1, 1, mask.blocks * mask.queries, 4), torch.randn(1, 1, mask.blocks * mask.keys, 4)
    with torch.inference_mode():
        before = BACKENDS[name](q, k, k, mask).clone()
    leaves = [x.clone().requires_grad_() for x in (q, k, k)]
    out = BACKENDS[name](leaves[0], leaves[1], leaves[2], mask)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert torch.allclose(out, before, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ["xformers", "flex"])
def test_a_cuda_kernel_is_refused_by_name_on_a_cpu(name: str) -> None:
    x = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=f"{name}.* CUDA.* cpu"):
        BACKENDS[name](x, x, x, None)
