"""`try_backends` times the attention of one forward pass and has no side effects on the model."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ar_model.attention import Attention, set_backend
from ar_model.attention_mask import BlockMask, Mask
from ar_model.attention_trial import Trial, reason, try_backends
from ar_model.backends import BACKENDS, reference
from tests.helpers.small_arvideo import build, random_batch


class Clock:
    """A fake `time.perf_counter`: tests advance `now`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class FakeBackend:
    """A backend that records its calls and advances the clock by the seconds given for the number of keys and the lap."""

    def __init__(self, clock: Clock, seconds_by_keys: dict[int, list[float]]) -> None:
        self.clock, self.seconds = clock, {keys: list(laps) for keys, laps in seconds_by_keys.items()}
        self.calls: list[tuple[torch.Size, torch.Size, torch.dtype, Mask]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        self.calls.append((q.shape, k.shape, q.dtype, mask))
        self.clock.now += self.seconds[k.shape[2]].pop(0)
        return reference(q, k, v, mask)


class ThreeLayers(nn.Module):
    """Two attention layers of one shape and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(8, 2) for _ in range(3)])
        self.grad_enabled: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.grad_enabled.append(torch.is_grad_enabled())
        x = self.layers[1](self.layers[0](x, mask=BlockMask(2, 3, 3)), mask=BlockMask(2, 3, 3))
        return self.layers[2](x, x[:, :5])


def test_the_time_of_a_backend_is_the_sum_over_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lap, in which kernels may be compiled, is ignored. Each layer counts with the fastest of the other laps."""
    clock = Clock(monkeypatch)
    spy = FakeBackend(clock, {6: [90.0, 3.0, 2.0, 4.0, 4.0], 5: [0.25, 0.75, 0.5, 0.5, 1.0]})
    monkeypatch.setitem(BACKENDS, "plain", spy)
    model = ThreeLayers()
    trial = try_backends(model, lambda: model(torch.randn(4, 6, 8)), ["plain"])
    assert trial.seconds == {"plain": 2 * 2.0 + 0.5}
    assert trial.failures == {} and trial.fastest == "plain"
    assert model.grad_enabled == [False]
    six, five = torch.Size((4, 2, 6, 4)), torch.Size((4, 2, 5, 4))
    assert spy.calls == [(six, six, torch.float32, BlockMask(2, 3, 3)), (six, five, torch.float32, None)] * 5


def test_backends_take_turns_so_that_other_load_affects_all(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    for name in ("plain", "sdpa"):

        def spy(*inputs: Any, name: str = name) -> Tensor:
            turns.append(name)
            return reference(*inputs)

        monkeypatch.setitem(BACKENDS, name, spy)
    layer = Attention(8, 2)
    try_backends(layer, lambda: layer(torch.randn(1, 4, 8)), ["plain", "sdpa"])
    # The first call is the forward pass that records shapes, with the model's own backend.
    assert turns == ["sdpa"] + ["plain", "sdpa"] * 5


def test_more_laps_make_more_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = FakeBackend(Clock(monkeypatch), {6: [9, 5, 4, 3, 2, 1], 5: [9, 5, 4, 3, 2, 1]})
    monkeypatch.setitem(BACKENDS, "plain", spy)
    model = ThreeLayers()
    assert try_backends(model, lambda: model(torch.randn(4, 6, 8)), ["plain"], laps=5).seconds == {"plain": 3}


def test_backends_are_tried_with_the_dtypes_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = FakeBackend(Clock(monkeypatch), {6: [1] * 5, 5: [1] * 5})
    monkeypatch.setitem(BACKENDS, "plain", spy)
    model = ThreeLayers()
    with torch.autocast("cpu", torch.bfloat16):
        trial = try_backends(model, lambda: model(torch.randn(4, 6, 8)), ["plain", "sdpa"])
    assert {call[2] for call in spy.calls} == {torch.bfloat16}
    assert set(trial.seconds) == {"plain", "sdpa"}


def test_a_backend_is_timed_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, backward_passes = Clock(monkeypatch), []

    def on_backward(g: Tensor) -> None:
        backward_passes.append(g)
        clock.now += 7

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        out = reference(q, k, v, mask)
        out.register_hook(on_backward)
        return out

    monkeypatch.setitem(BACKENDS, "plain", spy)
    layer = Attention(8, 2)
    assert try_backends(layer, lambda: layer(torch.randn(1, 4, 8)), ["plain"]).seconds == {"plain": 7}
    assert len(backward_passes) == 5


@pytest.mark.parametrize("settings", [{}, {"decoder_self": True, "ranks": 0.5, "target": "pixels"}])
def test_a_trial_does_not_change_the_model(settings: dict[str, Any]) -> None:
    model, batch = build(**settings).train(), random_batch(4)
    set_backend(model, "reference")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model(batch)["loss"]
    state = torch.get_rng_state()
    trial = try_backends(model, lambda: model(batch), ["plain", "sdpa", "xformers", "flex"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"reference"}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.training and torch.equal(model(batch)["loss"], before)
    assert set(trial.seconds) == {"plain", "sdpa"} and min(trial.seconds.values()) > 0
    assert trial.fastest in trial.seconds


def test_a_forward_pass_that_fails_leaves_no_hook_behind() -> None:
    layer = Attention(8, 2)
    with pytest.raises(RuntimeError):
        try_backends(layer, lambda: layer(torch.randn(1, 4, 9)), ["plain"])
    assert not any(m._forward_pre_hooks for m in layer.modules())


def test_on_a_cpu_the_cuda_kernels_are_failures_with_a_reason() -> None:
    layer = Attention(32, 2)
    trial = try_backends(layer, lambda: layer(torch.randn(1, 4, 32)), ["xformers", "flex", "plain"])
    assert list(trial.seconds) == ["plain"] and trial.fastest == "plain"
    assert set(trial.failures) == {"xformers", "flex"}
    assert all(name in why and "CUDA" in why and "cpu" in why for name, why in trial.failures.items())


def test_if_no_backend_runs_the_error_names_each_backend_and_its_reason() -> None:
    layer = Attention(32, 2)
    trial = try_backends(layer, lambda: layer(torch.randn(1, 4, 32)), ["xformers", "flex"])
    assert trial.seconds == {}
    with pytest.raises(ValueError, match="xformers: .*CUDA.*; flex: .*CUDA"):
        _ = trial.fastest


BROKEN = [
    ImportError,
    NotImplementedError,
    ValueError,
    RuntimeError,
    AttributeError,
    AssertionError,
    TypeError,
    OSError,
]
"""Errors of missing and of half-broken installations of a kernel's library."""


@pytest.mark.parametrize("error", BROKEN)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_kernel_that_raises_is_skipped(monkeypatch: pytest.MonkeyPatch, where: str, error: type[Exception]) -> None:
    def fail(*_: object) -> Any:
        raise error("no kernel\nfor  this")

    def broken(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        if where == "forward":
            fail()
        out = reference(q, k, v, mask)
        out.register_hook(fail)
        return out

    monkeypatch.setitem(BACKENDS, "plain", broken)
    layer, x = Attention(8, 2), torch.randn(1, 4, 8)
    trial = try_backends(layer, lambda: layer(x).sum(), ["plain", "sdpa"])
    assert list(trial.failures) == ["plain"] and "no kernel for this" in trial.failures["plain"]
    assert trial.fastest == "sdpa"
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("slow, fast", [("plain", "sdpa"), ("sdpa", "plain")])
def test_the_fastest_backend_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, slow: str, fast: str) -> None:
    def slow_backend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        time.sleep(0.03)
        return reference(q, k, v, mask)

    monkeypatch.setitem(BACKENDS, slow, slow_backend)
    layer, x = Attention(8, 2), torch.randn(1, 4, 8)
    trial = try_backends(layer, lambda: layer(x), [slow, fast])
    assert trial.fastest == fast
    assert trial.seconds[slow] >= 0.03


def test_only_a_timed_backend_can_be_the_fastest() -> None:
    assert Trial(seconds={"plain": 2.0, "sdpa": 1.0}, failures={"flex": "no"}).fastest == "sdpa"


def test_the_reason_of_an_error_without_a_message_is_its_type() -> None:
    assert "AssertionError" in reason(AssertionError())


def test_the_reason_of_xformers_is_that_of_its_operators() -> None:
    """Its message starts with the inputs, which fill several lines."""
    inputs = "".join(
        f"\n     {name:<10}: shape=(1, 1470, 8, 64) (torch.bfloat16)" for name in ("query", "key", "value")
    )
    operators = "\n`cutlassF-pt` is not supported because:\n    requires device with capability <= (9, 0)\n    too new"
    text = reason(
        NotImplementedError(
            f"No operator found for `memory_efficient_attention_forward` with inputs:{inputs}{operators}"
        )
    )
    assert text == "`cutlassF-pt` is not supported because: requires device with capability <= (9, 0) too new"


def test_the_reason_of_an_endless_error_is_short() -> None:
    assert len(reason(RuntimeError("line\n" * 10_000))) <= 2000
