"""`train_step` makes the same update with and without an Accelerator, and with any number of accumulated parts."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from data.loading import Batch
from pipelines.engine.step import Losses, SingleProcess, train_step

CPU = torch.device("cpu")


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, batch: Batch) -> Losses:
        loss = (self.layers(batch["x_B3"]) - batch["x_B3"].sum(1, keepdim=True)).square().mean()
        return {"loss": loss, "twice": 2 * loss.detach()}


def trained(backend: Accelerator | SingleProcess, parts: int, max_norm: float = torch.inf) -> tuple[nn.Module, Losses]:
    """Train for three steps of 8 samples in equal parts; return the module and the last losses."""
    module = Regression()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses: Losses = {}
    for step in range(3):
        x_B3 = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        batches = [{"x_B3": part} for part in x_B3.chunk(parts)]
        losses = train_step(backend, module, optimizer, batches, accumulate=parts, clipped=[module], max_norm=max_norm)
        assert all(parameter.grad is None for parameter in module.parameters())
    return module, losses


def test_a_step_without_an_accelerator_is_bit_equal_to_one_with_it() -> None:
    for state in (AcceleratorState, GradientState, PartialState):  # an earlier test may have set bf16
        state._reset_state()
    modules = [trained(backend, 2, 0.1)[0] for backend in (Accelerator(cpu=True), SingleProcess(CPU, bf16=False))]
    first, second = (list(module.parameters()) for module in modules)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_accumulated_parts_give_the_step_of_the_whole_batch() -> None:
    whole, losses = trained(SingleProcess(CPU, bf16=False), 1)
    parts, mean_losses = trained(SingleProcess(CPU, bf16=False), 4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert mean_losses["twice"] == pytest.approx(2 * float(losses["loss"]))
    assert not mean_losses["loss"].requires_grad


def test_each_module_is_clipped_by_its_own_norm_and_checked_before_the_update() -> None:
    module = Regression()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    norms: list[Tensor] = []

    def refuse(values: Tensor, losses: Losses) -> None:
        norms.append(values)
        raise FloatingPointError("no update")

    def batches() -> Iterator[Batch]:
        yield {"x_B3": torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.5, 1.0]])}

    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError):
        train_step(
            SingleProcess(CPU, bf16=False),
            module,
            optimizer,
            batches(),
            clipped=[module.layers[0], module.layers[2]],
            max_norm=0.01,
            check_gradient=refuse,
        )
    assert norms[0].shape == (2,)
    for layer in (module.layers[0], module.layers[2]):
        total = torch.stack([p.grad.norm() for p in layer.parameters() if p.grad is not None]).norm()
        assert float(total) == pytest.approx(0.01, rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_loss_that_is_not_finite_makes_every_gradient_nan() -> None:
    module = Regression()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def infinite(batch: Batch) -> Losses:
        return {"loss": module(batch)["loss"] + torch.inf}

    train_step(SingleProcess(CPU, bf16=False), infinite, optimizer, [{"x_B3": torch.ones(2, 3)}])
    assert all(parameter.isnan().all() for parameter in module.parameters())
