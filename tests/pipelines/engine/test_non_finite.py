"""The guard blocks updates on the device, and raises when the result of a step is known."""

import pytest
import torch
from torch import Tensor

from pipelines.engine import non_finite
from pipelines.engine.non_finite import NonFiniteGuard

CPU = torch.device("cpu")


class Training:
    """A weight with fused AdamW and the guard; `step` takes the gradient norm as it is given."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, fused=True)
        self.guard = NonFiniteGuard(self.optimizer, CPU)

    def step(self, name: str, norm: float = 1.0) -> None:
        self.weight.grad = torch.full((3,), norm)
        self.guard.before_update(torch.tensor([0.5, norm]), lambda: name)
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        return [self.weight.detach().clone(), *(x.clone() for x in self.optimizer.state[self.weight].values())]


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_finite, "DELAYED_ON", {"cpu"})


def test_finite_steps_are_those_of_an_optimizer_without_a_guard() -> None:
    guarded, plain = Training(), Training()
    for i in range(4):
        guarded.step(str(i), norm=0.1 * i)
        plain.weight.grad = torch.full((3,), 0.1 * i)
        plain.optimizer.step()
    guarded.guard.check()
    assert all(torch.equal(a, b) for a, b in zip(guarded.state(), plain.state(), strict=True))


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_step_is_blocked_and_raised_at_once_on_a_cpu(norm: float) -> None:
    training = Training()
    training.step("first")
    before = training.state()
    with pytest.raises(FloatingPointError, match="second"):
        training.step("second", norm)
    assert all(torch.equal(a, b) for a, b in zip(training.state(), before, strict=True))


@pytest.mark.usefixtures("delayed")
def test_a_delayed_result_blocks_all_later_updates_and_names_the_first_step() -> None:
    training = Training()
    training.step("first")
    before = training.state()
    training.step("second", float("nan"))
    with pytest.raises(FloatingPointError, match="second"):
        training.step("third")
    training.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(training.state(), before, strict=True))


@pytest.mark.usefixtures("delayed")
def test_check_reads_the_last_step_too() -> None:
    training = Training()
    training.step("first")
    training.guard.check()
    training.step("last", float("inf"))
    with pytest.raises(FloatingPointError, match="last"):
        training.guard.check()
