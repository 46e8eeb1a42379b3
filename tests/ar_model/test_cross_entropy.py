"""The cross-entropy in chunks is the cross-entropy of whole logits, loss and gradients; whole logits never exist."""

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


def whole(h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h_ND, weight_VD, bias_V).float(), target_N)


def draw(n: int = N, width: int = D, vocab: int = V, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    h, weight, bias = (torch.randn(shape, generator=generator) for shape in ((n, width), (vocab, width), (vocab,)))
    return h, weight, bias, torch.randint(0, vocab, (n,), generator=generator)


def with_gradients(loss: Loss, inputs: Inputs, upstream: float = 1.0) -> list[Tensor]:
    """Loss and the gradients of h, weight and bias."""
    *leaves, target_N = (x.clone() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    value = loss(leaves[0], leaves[1], leaves[2], target_N)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(upstream))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for what, got, truth in zip(("loss", "dh", "dweight", "dbias"), found, expected, strict=True):
        assert got.shape == truth.shape and got.dtype == torch.float32
        error = (got - truth).norm() / truth.norm()
        assert error <= tolerance, f"{what}: {float(error):.1e}"


@pytest.mark.parametrize("upstream", [1.0, -3.5, 1e-3])
@pytest.mark.parametrize("rows", [1, 2, 36, 37, 38, 1000])
def test_in_chunks_of_any_size_it_equals_the_cross_entropy_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, upstream: float
) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", rows * V + V - 1)
    found, expected = (with_gradients(loss, draw(), upstream) for loss in (linear_cross_entropy, whole))
    assert_close(found, expected, 1e-6)


def test_a_vocabulary_larger_than_a_chunk_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 3)
    assert_close(with_gradients(linear_cross_entropy, draw()), with_gradients(whole, draw()), 1e-6)


@pytest.mark.parametrize("n, width, vocab", [(1, 1, 1), (1, 5, 7), (300, 1, 2), (50, 32, 1000)])
def test_sizes_from_one_to_a_thousand(n: int, width: int, vocab: int) -> None:
    inputs = draw(n, width, vocab)
    found, expected = with_gradients(linear_cross_entropy, inputs), with_gradients(whole, inputs)
    if vocab == 1:  # certain: no loss, no gradient
        assert all(x.abs().max() < 1e-6 for x in found)
    else:
        assert_close(found, expected, 2e-6)


def test_large_logits_do_not_overflow() -> None:
    h, weight, bias, target = draw()
    inputs = (h * 200, weight, bias, target)
    found, expected = with_gradients(linear_cross_entropy, inputs), with_gradients(whole, inputs)
    assert all(x.isfinite().all() for x in found)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("rows", [5, 1000])
def test_under_autocast_it_equals_whole_logits_within_the_precision_of_bf16(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", rows * 50)
    inputs = draw(200, 16, 50)

    def low(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*x)

    truth = with_gradients(whole, inputs)
    found = with_gradients(low, inputs)
    assert_close(found, truth, 1e-2)
    assert (found[1] - truth[1]).norm() > 1e-4 * truth[1].norm()  # the products were indeed of lower precision
    assert found[1].dtype == torch.float32  # as the inputs are


def test_a_bf16_input_under_autocast_gets_a_bf16_gradient() -> None:
    h, weight, bias, target = draw(200, 16, 50)
    low, weight, bias = h.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(low, weight, bias, target)
    loss.backward()
    truth = with_gradients(whole, (h, weight.detach(), bias.detach(), target))
    assert loss.dtype == torch.float32
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    assert weight.grad is not None and bias.grad is not None
    assert_close([loss.detach(), low.grad.float(), weight.grad, bias.grad], truth, 2e-2)


def test_the_sum_of_many_predictions_is_kept_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a sum stops growing at 256 summands of equal size; gradients of weights come of many chunks."""
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 4 * 3)
    weight = torch.tensor([[0.5, 0.25], [0.0, 1.0], [-0.5, 0.125]])
    inputs = (torch.ones(4096, 2), weight, torch.zeros(3), torch.zeros(4096, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(linear_cross_entropy, inputs)
    assert_close(found, with_gradients(whole, inputs), 1e-2)


@pytest.mark.parametrize(
    "learns", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_inputs_that_do_not_learn_get_no_gradient(learns: tuple[bool, bool, bool]) -> None:
    *leaves, target = draw()
    expected = with_gradients(whole, draw())[1:]
    leaves = [x.requires_grad_(wanted) for x, wanted in zip(leaves, learns, strict=True)]
    linear_cross_entropy(leaves[0], leaves[1], leaves[2], target).backward()
    for x, wanted, truth in zip(leaves, learns, expected, strict=True):
        assert (x.grad is not None) == wanted
        assert not wanted or torch.allclose(x.grad, truth, atol=1e-6)


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operation makes, and the products among the operations."""

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
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 2048)
    inputs = draw(64, 4, 512)  # weights have 2,048 numbers, whole logits 32,768
    with Largest() as made:
        found = with_gradients(linear_cross_entropy, inputs)
    assert made.numel == 2048
    with Largest() as made:
        expected = with_gradients(whole, inputs)
    assert made.numel == 64 * 512  # the measure measures
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("silent", [torch.no_grad, torch.inference_mode])
def test_where_nothing_is_learned_no_gradient_is_made(silent: Any) -> None:
    """Also if a parameter is among the inputs: validation must not pay for gradients."""
    h, weight, bias, target = draw()
    bias = torch.nn.Parameter(bias)
    with Largest() as made, silent():
        loss = linear_cross_entropy(h, weight, bias, target)
    assert made.products == 1
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(whole(h, weight, bias, target).item(), rel=1e-6)
    with Largest() as made:
        linear_cross_entropy(h, weight, bias, target)
    assert made.products == 3
