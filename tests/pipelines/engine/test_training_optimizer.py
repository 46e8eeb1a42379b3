"""AdamW of a training run: weight decay on matrices only, and betas from the settings."""

import torch
from torch import nn

from pipelines.engine.training import make_optimizer
from pipelines.settings.training import Training


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.discriminator = nn.Linear(3, 4), nn.Linear(4, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_all_parameters_have_the_betas_of_the_settings() -> None:
    optimizer = make_optimizer(Adversaries(), Training(betas=(0.9, 0.98), weight_decay=0.3))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.98)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


def test_a_part_has_its_own_betas_and_every_parameter_is_in_one_group() -> None:
    module = Adversaries()
    module.own_betas = {module.discriminator: (0.5, 0.9)}  # type: ignore[assignment]  # not a submodule
    optimizer = make_optimizer(module, Training())
    betas_of = {p: group["betas"] for group in optimizer.param_groups for p in group["params"]}
    assert betas_of == {
        **dict.fromkeys(module.tokenizer.parameters(), (0.9, 0.95)),
        **dict.fromkeys(module.discriminator.parameters(), (0.5, 0.9)),
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_update_is_that_of_adamw_with_these_betas() -> None:
    weight = torch.tensor([[1.0, -2.0]])
    module = nn.Linear(2, 1, bias=False)
    module.weight.data.copy_(weight)
    optimizer = make_optimizer(module, Training(betas=(0.5, 0.75), weight_decay=0.0, lr=0.1))
    first, second = torch.zeros(1, 2), torch.zeros(1, 2)
    for step, gradient in enumerate((torch.tensor([[1.0, 3.0]]), torch.tensor([[-2.0, 1.0]])), start=1):
        module.weight.grad = gradient
        optimizer.step()
        first, second = 0.5 * first + 0.5 * gradient, 0.75 * second + 0.25 * gradient**2
        weight = weight - 0.1 * (first / (1 - 0.5**step)) / ((second / (1 - 0.75**step)).sqrt() + 1e-8)
    assert torch.allclose(module.weight, weight)
