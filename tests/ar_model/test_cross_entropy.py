"""Chunked cross-entropy has the loss and gradients of cross-entropy on all logits, and never materialises all logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ar_model import cross_entropy
from ar_model.cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
N, D, V = 37, 6, 11


def unchunked(h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h_ND, weight_VD, bias_V).float(), target_N)


def draw(n: int = N, width: int = D, vocab: int = V, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    h, weight, bias = (torch.randn(shape, generator=generator) for shape in ((n, width), (vocab, width), (vocab,)))
    return h, weight, bias, torch.randint(0, vocab, (n,), generator=generator)


def with_gradients(loss: Loss, inputs: Inputs, upstream: float = 1.0) -> list[Tensor]:
    """Return the loss and the gradients of h, weight and bias."""
    *leaves, target_N = (x.clone() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    value = loss(leaves[0], leaves[1], leaves[2], target_N)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(upstream))]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, result, correct in zip(("loss", "dh", "dweight", "dbias"), results, expected, strict=True):
        assert result.shape == correct.shape and result.dtype == torch.float32
        error = (result - correct).norm() / correct.norm()
        assert error <= tolerance, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("upstream", [1.0, -3.5, 1e-3])
@pytest.mark.parametrize("rows", [1, 2, 36, 37, 38, 1000])
def test_chunks_of_any_size_equal_unchunked_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, rows: int, upstream: float
) -> None:
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cpu", rows * V + V - 1)
    results, expected = (with_gradients(loss, draw(), upstream) for loss in (linear_cross_entropy, unchunked))
    assert_close(results, expected, 1e-6)


def test_a_vocabulary_larger_than_a_chunk_has_chunks_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cpu", 3)
    assert_close(with_gradients(linear_cross_entropy, draw()), with_gradients(unchunked, draw()), 1e-6)


@pytest.mark.parametrize("n, width, vocab", [(1, 1, 1), (1, 5, 7), (300, 1, 2), (50, 32, 1000)])
def test_sizes_from_one_to_a_thousand(n: int, width: int, vocab: int) -> None:
    inputs = draw(n, width, vocab)
    results, expected = with_gradients(linear_cross_entropy, inputs), with_gradients(unchunked, inputs)
    if vocab == 1:  # loss and gradients are 0
        assert all(x.abs().max() < 1e-6 for x in results)
    else:
        assert_close(results, expected, 2e-6)


def test_large_logits_do_not_overflow() -> None:
    h, weight, bias, target = draw()
    inputs = (h * 200, weight, bias, target)
    results, expected = with_gradients(linear_cross_entropy, inputs), with_gradients(unchunked, inputs)
    assert all(x.isfinite().all() for x in results)
    assert_close(results, expected, 1e-5)


@pytest.mark.parametrize("rows", [5, 1000])
def test_under_autocast_it_equals_unchunked_cross_entropy_within_bf16_precision(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cpu", rows * 50)
    inputs = draw(200, 16, 50)

    def autocast_loss(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*x)

    expected = with_gradients(unchunked, inputs)
    results = with_gradients(autocast_loss, inputs)
    assert_close(results, expected, 1e-2)
    assert (results[1] - expected[1]).norm() > 1e-4 * expected[1].norm()  # the matmuls did run in bf16
    assert results[1].dtype == torch.float32  # the dtype of the input


def test_a_bf16_input_under_autocast_gets_a_bf16_gradient() -> None:
    h, weight, bias, target = draw(200, 16, 50)
    low, weight, bias = h.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(low, weight, bias, target)
    loss.backward()
    expected = with_gradients(unchunked, (h, weight.detach(), bias.detach(), target))
    assert loss.dtype == torch.float32
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    assert weight.grad is not None and bias.grad is not None
    assert_close([loss.detach(), low.grad.float(), weight.grad, bias.grad], expected, 2e-2)


def test_sums_over_chunks_are_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bf16 sum stops growing after 256 equal summands, and weight gradients are sums over many chunks."""
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cpu", 4 * 3)
    weight = torch.tensor([[0.5, 0.25], [0.0, 1.0], [-0.5, 0.125]])
    inputs = (torch.ones(4096, 2), weight, torch.zeros(3), torch.zeros(4096, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        results = with_gradients(linear_cross_entropy, inputs)
    assert_close(results, with_gradients(unchunked, inputs), 1e-2)


@pytest.mark.parametrize(
    "needs_grad", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_inputs_that_need_no_gradient_get_none(needs_grad: tuple[bool, bool, bool]) -> None:
    *leaves, target = draw()
    expected = with_gradients(unchunked, draw())[1:]
    leaves = [x.requires_grad_(needed) for x, needed in zip(leaves, needs_grad, strict=True)]
    linear_cross_entropy(leaves[0], leaves[1], leaves[2], target).backward()
    for x, needed, gradient in zip(leaves, needs_grad, expected, strict=True):
        assert (x.grad is not None) == needed
        assert not needed or torch.allclose(x.grad, gradient, atol=1e-6)


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)


class OperationLog(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in PRODUCTS
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.MAX_LOGITS, "cpu", 2048)
    inputs = draw(64, 4, 512)  # the weight has 2,048 elements, all logits have 32,768
    with OperationLog() as log:
        results = with_gradients(linear_cross_entropy, inputs)
    assert log.numel == 2048
    with OperationLog() as log:
        expected = with_gradients(unchunked, inputs)
    assert log.numel == 64 * 512
    assert_close(results, expected, 1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_no_gradient_is_computed(mode: Any) -> None:
    """Validation must not pay for gradients, even if an input is a parameter."""
    h, weight, bias, target = draw()
    bias = torch.nn.Parameter(bias)
    with OperationLog() as log, mode():
        loss = linear_cross_entropy(h, weight, bias, target)
    assert log.products == 1
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(unchunked(h, weight, bias, target).item(), rel=1e-6)
    with OperationLog() as log:
        linear_cross_entropy(h, weight, bias, target)
    assert log.products == 3
