"""The traced cost of a step equals a count by hand, and the trace has no side effects."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ar_model.attention import set_backend
from ar_model.costs import Build, cost_of
from ar_model.inputs import CodeSpec
from ar_model.objectives import ARVideo
from ar_model.transformer import recompute_activations

SPEC = CodeSpec(shape=(2, 4, 4), vocab_size=24, levels=((4, 3, 2),), clip=(4, 16, 16))
BOXES = {"clusters": (1, 2, 2), "keep": 0.5, "targets": 0.75}
"""8 clusters of 4 codes, 7 of them with a next one: 14 tokens are visible, 21 predicted. A tubelet is 2x4x4 pixels."""
B, M, Q, D, E, V, PIXELS = 3, 14, 21, 16, 12, 24, 3 * 2 * 4 * 4
DEPTH, DECODER_DEPTH = 2, 1
SIZES = {"width": D, "depth": DEPTH, "heads": 2, "decoder_width": E, "decoder_depth": DECODER_DEPTH, "decoder_heads": 3}
SCORES = (7 * 2 + 5 * 2 + 3 * 2 + 1 * 1) / 49
"""Share of the scores of 7 x 7 blocks that plain attention computes. It splits the queries into 2, 2, 2 and 1 blocks."""


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


def by_hand(first: int, head: int, scores: float, passes: float = 3, visible: int = M) -> float:
    """Return the FLOPs of a step.

    Every weight is used once in the forward and twice in the backward pass. The exception is the `first` layer, whose input needs
    no gradient.

    Args:
        first: weights of a linear input layer.
        head: weights of the head.
        scores: share of the attention scores that are computed.
        passes: number of times that each matmul of attention is computed in the forward and backward pass.
        visible: tokens that the encoder sees.
    """
    weights = 12 * D * D * DEPTH * visible  # q, kv, out and the MLP's 4 + 4
    weights += DECODER_DEPTH * (10 * E * E * Q + 2 * E * E * visible) + D * E * visible + head * Q
    # Queries times keys. Multiplying by the values takes as many.
    products = DEPTH * visible * visible * D + DECODER_DEPTH * Q * visible * E
    return 2 * B * (3 * weights + 2 * first * visible + passes * scores * 2 * products)


CODES = E * E + E * V
"""Weights of CodeTarget: `split`, and the output vectors."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, by_hand(0, CODES, SCORES)),
        ({"causal": False, "keep": 0.25}, by_hand(0, CODES, 1, visible=7)),
        ({"backend": "sdpa"}, by_hand(0, CODES, 1, passes=3.5)),  # the backward pass of sdpa computes the scores again
        ({"input": "pixels", "target": "pixels"}, by_hand(PIXELS * D, PIXELS * E, SCORES)),
    ],
)
def test_flops_of_arvideo(settings: dict[str, Any], expected: float) -> None:
    assert cost_of(step_of(partial(arvideo, **settings))).flop == expected


def test_flops_of_activation_checkpointing() -> None:
    """Each block is computed again, except for the second layer of its MLP, whose output the backward pass does not need."""
    without, with_recompute = (cost_of(step_of(partial(arvideo, recompute=r))).flop for r in (False, True))
    recomputed = DEPTH * (8 * D * D * M + SCORES * 2 * M * M * D)
    recomputed += DECODER_DEPTH * (6 * E * E * Q + 2 * E * E * M + SCORES * 2 * Q * M * E)
    assert with_recompute - without == 2 * B * recomputed


@pytest.mark.parametrize("recompute", [False, True])
def test_a_real_step_has_the_traced_flops(recompute: bool) -> None:
    build = step_of(partial(arvideo, recompute=recompute))
    with FlopCounterMode(display=False) as counter:
        build()[1]()
    assert cost_of(build).flop == counter.get_total_flops()


def two_layers() -> tuple[nn.Module, Callable[[], None]]:
    """Build layers 1000 x 100 -> 200 -> 300 -> 1 number, without biases, and a buffer of 50 numbers."""
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
    # At the peak, the backward pass of y * y holds y, its two gradients and their sum. One layer's output is freed by then.
    assert x + hidden + 3 * y <= cost.others <= x + hidden + 4 * y + 8
    assert weights + cost.state + cost.others <= cost.peak <= weights + weights + cost.state + cost.others


def test_the_peak_is_in_the_optimizer_step_if_weights_dominate() -> None:
    """A wide layer on one sample: the peak is the weight, its gradient and two moments."""

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


def test_activation_checkpointing_takes_less_memory() -> None:
    without, with_recompute = (cost_of(step_of(partial(arvideo, recompute=r), batch=64)) for r in (False, True))
    assert with_recompute.others < without.others / 2
    for part in ("weights", "gradients", "state"):
        assert getattr(with_recompute, part) == getattr(without, part)


def test_a_model_too_large_for_any_machine_can_be_traced() -> None:
    def build() -> tuple[nn.Module, Callable[[], None]]:
        module = nn.Linear(2**20, 2**20, bias=False)
        return module, lambda: module(torch.ones(8, 2**20)).sum().backward()

    cost = cost_of(build)
    assert (cost.weights, cost.flop) == (2**42, 2 * 2 * 8 * 2**40)


def test_real_masks_can_be_indices() -> None:
    """The public VideoMAE indexes with masks: `x[mask]` has as many rows as the mask has true values."""
    mask = torch.tensor([[True, False, True], [True, True, False]])

    def build() -> tuple[nn.Module, Callable[[], None]]:
        module = nn.Linear(5, 7)

        def step() -> None:
            x = torch.ones(2, 3, 5, requires_grad=True)
            (module(x[mask]).sum() + module(x[~mask]).sum()).backward()

        return module, step

    assert cost_of(build).flop == 3 * 2 * (4 + 2) * 5 * 7


def test_a_trace_has_no_side_effects() -> None:
    """Attention caches masks, but a real step must give the same loss before and after a trace."""
    before = step_of(arvideo)()[1]()
    assert cost_of(step_of(arvideo)) == cost_of(step_of(arvideo))
    assert step_of(arvideo)()[1]() == before
