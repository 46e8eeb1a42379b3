"""What a step costs, found without doing it, is what a count by hand gives; nothing of the trace is left over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ar_model.attention import set_backend
from ar_model.costs import Build, Cost, cost_of
from ar_model.inputs import CodeSpec
from ar_model.objectives import ARVideo
from ar_model.transformer import recompute_activations

SPEC = CodeSpec(shape=(2, 4, 4), vocab_size=24, levels=(4, 3, 2), clip=(4, 16, 16))
BOXES = {"clusters": (1, 2, 2), "keep": 0.5, "targets": 0.75}
"""8 clusters of 4 codes, of which 7 have a next one: 14 tokens are seen, 21 predicted. A tubelet is 2x4x4 pixels."""
B, M, Q, D, E, V, PIXELS = 3, 14, 21, 16, 12, 24, 3 * 2 * 4 * 4
DEPTH, DECODER_DEPTH = 2, 1
SIZES = {"width": D, "depth": DEPTH, "heads": 2, "decoder_width": E, "decoder_depth": DECODER_DEPTH, "decoder_heads": 3}
RUNS = 7 * 2 + 5 * 2 + 3 * 2 + 1 * 1
"""Products of runs that plain attention makes of 7 x 7: it cuts the queries into pieces of 2, 2, 2 and 1."""


def arvideo(backend: str = "plain", recompute: bool = False, batch: int = B, **settings: Any) -> ARVideo:
    torch.manual_seed(0)
    objective = ARVideo(SPEC, **{**BOXES, **SIZES, **settings})
    set_backend(objective, backend)
    if recompute:
        recompute_activations(objective)
    return objective


def step_of(make: Callable[[], ARVideo], batch: int = B) -> Build:
    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        objective = make()
        optimizer = torch.optim.AdamW(objective.parameters(), fused=True)

        def step() -> Tensor:
            loss = objective(
                {
                    "codes_BTHW": torch.arange(32).expand(batch, 32).reshape(batch, 2, 4, 4) % V,
                    "pixels_BTHWC": torch.zeros(batch, 4, 16, 16, 3, dtype=torch.uint8),
                    "seed_B": torch.arange(batch),
                }
            )["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return objective, step

    return build


def by_hand(first: int, head: int, scores: float, attention: float = 3, seen: int = M) -> float:
    """Of a step: every weight is used once forward and twice backward, except for the `first`, to whose input nothing goes.

    `scores`: share of the products of attention that are made; `attention`: how often each is made in forward and backward.
    """
    weights = 12 * D * D * DEPTH * seen  # q, kv, out and the MLP's 4 + 4
    weights += DECODER_DEPTH * (10 * E * E * Q + 2 * E * E * seen) + D * E * seen + head * Q
    products = DEPTH * seen * seen * D + DECODER_DEPTH * Q * seen * E  # queries by keys, and as many for the values
    return 2 * B * (3 * weights + 2 * first * seen + attention * scores * 2 * products)


CODES = E * E + E * V
"""The split, and the logits."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, by_hand(0, CODES, RUNS / 49)),
        ({"causal": False, "keep": 0.25}, by_hand(0, CODES, 1, seen=7)),
        ({"backend": "sdpa"}, by_hand(0, CODES, 1, attention=3.5)),  # its backward makes the scores again
        ({"input": "pixels", "target": "pixels"}, by_hand(PIXELS * D, PIXELS * E, RUNS / 49)),
    ],
)
def test_arithmetic_of_arvideo(settings: dict[str, Any], expected: float) -> None:
    assert cost_of(step_of(lambda: arvideo(**settings))).flop == expected


def test_arithmetic_of_recomputation() -> None:
    """Each block is computed once more, up to the last that its backward wants: not the second layer of its MLP."""
    plain, more = (cost_of(step_of(lambda r=r: arvideo(recompute=r))).flop for r in (False, True))  # type: ignore[misc]
    again = DEPTH * (8 * D * D * M + RUNS / 49 * 2 * M * M * D)
    again += DECODER_DEPTH * (6 * E * E * Q + 2 * E * E * M + RUNS / 49 * 2 * Q * M * E)
    assert more - plain == 2 * B * again


@pytest.mark.parametrize("recompute", [False, True])
def test_a_real_step_is_as_much(recompute: bool) -> None:
    build = step_of(lambda: arvideo(recompute=recompute))
    with FlopCounterMode(display=False) as counter:
        build()[1]()
    assert cost_of(build).flop == counter.get_total_flops()


def two_layers() -> tuple[nn.Module, Callable[[], None]]:
    """1000 x 100 -> 200 -> 300 -> 1 number, without biases, and a buffer of 50."""
    module = nn.Sequential(nn.Linear(100, 200, bias=False), nn.Sigmoid(), nn.Linear(200, 300, bias=False))
    module.register_buffer("unused", torch.zeros(50))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)

    def step() -> None:
        x = torch.ones(1000, 100)
        y = module(x)
        (y * y).sum().backward()
        del y
        optimizer.step()
        optimizer.zero_grad()

    return module, step


def test_memory_of_two_layers() -> None:
    weights = 4 * (100 * 200 + 200 * 300)
    cost = cost_of(two_layers)
    assert (cost.weights, cost.gradients, cost.state) == (weights + 4 * 50, weights, 2 * weights + 2 * 4)
    x, hidden, y = (4 * 1000 * n for n in (100, 200, 300))
    # Backward of y * y, when y twice, its two gradients and their sum are there; one layer's output is no longer needed.
    assert x + hidden + 3 * y <= cost.others <= x + hidden + 4 * y + 8
    assert weights + cost.state + cost.others <= cost.peak <= weights + weights + cost.state + cost.others


def test_memory_of_gradients_counts_at_the_end() -> None:
    """A wide layer on one number: nothing but its weight's copies."""

    def build() -> tuple[nn.Module, Callable[[], None]]:
        module = nn.Linear(1000, 1000, bias=False)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)

        def step() -> None:
            module(torch.ones(1, 1000)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return module, step

    cost = cost_of(build)
    assert cost.peak == pytest.approx(4 * cost.weights, rel=0.01)
    assert cost.others == pytest.approx(2 * 4 * 1000, rel=0.01)


def test_recomputation_takes_less_memory() -> None:
    plain, less = (cost_of(step_of(lambda r=r: arvideo(recompute=r), batch=64)) for r in (False, True))  # type: ignore[misc]
    assert less.others < plain.others / 2
    assert (less.weights, less.gradients, less.state) == (plain.weights, plain.gradients, plain.state)


def test_what_is_too_large_for_any_machine() -> None:
    def build() -> tuple[nn.Module, Callable[[], None]]:
        module = nn.Linear(2**20, 2**20, bias=False)
        return module, lambda: module(torch.ones(8, 2**20)).sum().backward()

    cost = cost_of(build)
    assert (cost.weights, cost.flop) == (2**42, 2 * 2 * 8 * 2**40)


def test_real_masks_may_choose() -> None:
    """As VideoMAE's do: `x[mask]` has as many rows as the mask has trues."""
    mask = torch.tensor([[True, False, True], [True, True, False]])

    def build() -> tuple[nn.Module, Callable[[], None]]:
        module = nn.Linear(5, 7)

        def step() -> None:
            x = torch.ones(2, 3, 5, requires_grad=True)
            (module(x[mask]).sum() + module(x[~mask]).sum()).backward()

        return module, step

    assert cost_of(build).flop == 3 * 2 * (4 + 2) * 5 * 7


def test_nothing_is_left_over() -> None:
    """Attention keeps masks: a real step after a trace gives what one before it gave."""
    before = step_of(arvideo)()[1]()
    counted: list[Cost] = [cost_of(step_of(arvideo)) for _ in range(2)]
    assert counted[0] == counted[1]
    assert step_of(arvideo)()[1]() == before
