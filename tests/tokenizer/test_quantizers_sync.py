"""Processes that train together have the same codebook, learned from the data of all, or refuse to train."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import in_processes
from tests.helpers.small_tokenizers import pixels
from tokenizer import VQ3D
from tokenizer.base import to_float
from tokenizer.quantizers import Quantizer, make_quantizer


def built_early() -> VQ3D:
    """Build a tokenizer before the process group exists."""
    return VQ3D(name="vq3d-2x4x4-emavq16", width=8, depth=0)


def refusal(early: VQ3D) -> str:
    """Return the error of training a tokenizer that was built before the process group."""
    try:
        early.train()(pixels(1))
    except ValueError as error:
        return str(error)
    return "none"


def differences(module: nn.Module, count: int) -> dict[str, float]:
    """Return the largest difference between processes for each tensor of a module's state."""
    largest = {}
    for name, value in module.state_dict().items():
        values = [torch.empty_like(value) for _ in range(count)]
        dist.all_gather(values, value.contiguous())
        largest[name] = max(float((other.double() - value.double()).abs().max()) for other in values)
    return largest


def train(rank: int, count: int, steps: int, options: dict[str, Any], broadcast: bool, early: VQ3D) -> dict[str, Any]:
    """Train on data whose values and batch size differ between processes."""
    torch.manual_seed(rank)
    tokenizer = VQ3D(name="vq3d-2x4x4-emavq64", width=8, depth=1, options={"channels": 4, **options})
    parallel = DistributedDataParallel(tokenizer, broadcast_buffers=broadcast)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    quantized: list[Tensor] = []
    tokenizer.quantizer.register_forward_pre_hook(lambda _, inputs: quantized.append(inputs[0].detach().flatten(0, 1)))
    worst: dict[str, float] = {}
    revived_from: set[int] = set()
    for step in range(steps):
        clips = pixels(2 + rank, 2, 8, 8, seed=100 * step + rank) // (rank + 1)
        out = parallel(clips)
        loss = (out["video"] - to_float(clips)).square().mean() + out["quantizer"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        worst = {name: max(value, worst.get(name, 0)) for name, value in differences(tokenizer, count).items()}
        vectors_of_all: list[Any] = [None] * count
        dist.all_gather_object(vectors_of_all, quantized.pop())
        for other, vectors in enumerate(vectors_of_all):
            if (tokenizer.codebook()[:, None] == vectors).all(-1).any():  # type: ignore[index]
                revived_from.add(other)
    codebook = tokenizer.codebook()
    return {"worst": worst, "revived_from": revived_from, "codebook": codebook, "refusal": refusal(early)}


@pytest.mark.parametrize(
    "count, steps, options, broadcast",
    [
        # With this decay, codes die within 20 steps.
        (2, 20, {"decay": 0.5}, False),
        pytest.param(2, 200, {}, True, marks=pytest.mark.soak),
        pytest.param(2, 200, {"cosine": True}, False, marks=pytest.mark.soak),
        pytest.param(2, 200, {"revive_below": 0.0}, False, marks=pytest.mark.soak),
        pytest.param(4, 200, {}, False, marks=pytest.mark.soak),
        pytest.param(4, 200, {}, True, marks=pytest.mark.soak),
    ],
)
def test_all_processes_hold_the_same_codebook_after_every_step(
    tmp_path: Path, count: int, steps: int, options: dict[str, Any], broadcast: bool
) -> None:
    """Vectors of all processes initialise the codebook by k-means and replace dead codes."""
    results = in_processes(train, count, tmp_path, steps, options, broadcast, before=built_early)
    buffers = {f"quantizer.vq._codebook.{name}" for name in ("initted", "cluster_size", "embed_avg", "embed")}
    for result in results:
        assert len(result["worst"]) > 20 and set(result["worst"].values()) == {0.0}
        assert {name for name in result["worst"] if "_codebook" in name} == buffers
        assert result["codebook"].isfinite().all()
        assert "after the process group" in result["refusal"]
    if options.get("revive_below") != 0 and not options.get("cosine"):
        assert results[0]["revived_from"] == set(range(count))


def step_of(rank: int, count: int, name: str, options: dict[str, Any], state: Any, z: Tensor) -> dict[str, Any]:
    """Run one step of one rank on its share of the vectors."""
    return stepped(make_quantizer(name, options), state, z.chunk(count)[rank])


def stepped(quantizer: Quantizer, state: Any, z: Tensor) -> dict[str, Any]:
    """Return loss, state and gradient of one step."""
    quantizer.load_state_dict(state)
    z = z.clone().requires_grad_()
    quantized, _, loss = quantizer.train()(z)
    (gradient,) = torch.autograd.grad(loss + quantized.sum() * 0, z)
    after = {name: value.clone() for name, value in quantizer.state_dict().items()}
    return {"loss": loss.detach(), "state": after, "gradient": gradient}


@pytest.mark.parametrize(
    "name, options", [("emavq16", {"revive_below": 0.0}), ("lfq16", {"entropy": 1.0, "commitment": 0.0})]
)
def test_two_processes_have_the_update_of_one_process_with_all_data(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """A process must not learn from its own data only, and its share must have the full weight."""
    torch.manual_seed(0)
    quantizer = make_quantizer(name, options)
    z = torch.randn(4, 50, quantizer.channels) + 0.5
    z[2:] -= 1
    quantizer.train()(z + 0.1)
    state = quantizer.state_dict()
    alone = stepped(make_quantizer(name, options), state, z)
    halves = in_processes(step_of, 2, tmp_path, name, options, state, z)
    for key, value in alone["state"].items():
        for half in halves:
            assert torch.allclose(half["state"][key], value, atol=1e-6), key
    own = [stepped(make_quantizer(name, options), state, part)["state"] for part in z.chunk(2)]
    assert name == "lfq16" or not torch.allclose(own[0]["vq._codebook.embed"], own[1]["vq._codebook.embed"], atol=1e-3)
    # Distributed training averages the gradients.
    together = torch.cat([half["gradient"] for half in halves]) / 2
    assert torch.allclose(together, alone["gradient"], rtol=1e-3, atol=1e-6)
    assert torch.stack([half["loss"] for half in halves]).mean().item() == pytest.approx(alone["loss"].item(), rel=1e-4)
