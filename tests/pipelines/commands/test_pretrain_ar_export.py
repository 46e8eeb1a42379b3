"""Saved weights are bit-equal to the trained ones, whether the model was trained plain, compiled or wrapped in DDP."""

import functools
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from ar_model.attention import set_backend
from ar_model.objectives import ARVideo, Objective, load_objective
from ar_model.transformer import compile_blocks
from data.cache import TokenCache, find_cache
from data.loading import evaluation_batches
from pipelines.commands import pretrain_ar
from pipelines.engine import network
from tests.helpers.commands import TINY_MODEL, Call

Outputs = list[torch.Tensor]


@pytest.fixture(scope="module")
def batch(finished_project: Path) -> dict[str, torch.Tensor]:
    cache = TokenCache.open(find_cache(finished_project / "caches", None))
    return next(iter(evaluation_batches(cache, [0, 5, 30], 3)))


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make torch.compile trace the blocks and run the traced graphs without code generation."""
    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(network, "check_compiler", lambda device: None)
    yield
    torch.compiler.reset()


@pytest.fixture
def one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment of a process group with world size 1: accelerate wraps the model for distributed training (gloo)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**process, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}.items():
        monkeypatch.setenv(name, value)


def outputs(objective: Objective, batch: dict[str, torch.Tensor], precision: str) -> Outputs:
    """Loss and features in evaluation mode, as in a validation or a probe of that precision."""
    objective.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return [objective(batch)["loss"], *objective.features(batch)]


def assert_bit_equal(a: Outputs, b: Outputs) -> None:
    assert len(a) == len(b) == 3
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def keys(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["plain", "compiled", "wrapped"])
def test_the_saved_model_equals_the_trained_model(
    call: Call,
    finished_project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    batch: dict[str, torch.Tensor],
    how: str,
    precision: str,
) -> None:
    if how != "plain":
        request.getfixturevalue("quick_compiler" if how == "compiled" else "one_of_one")
    monkeypatch.chdir(finished_project)
    wrapped: Counter[str] = Counter()
    forward = DistributedDataParallel.forward
    monkeypatch.setattr(DistributedDataParallel, "forward", lambda *a: wrapped.update(["calls"]) or forward(*a))
    trained: list[Objective] = []
    fit = pretrain_ar.fit
    monkeypatch.setattr(pretrain_ar, "fit", lambda *a, **more: trained.append(a[2]) or fit(*a, **more))
    counters.clear()
    flags = [*TINY_MODEL, "--precision", precision, "--out", str(tmp_path)]
    call("pretrain_ar", *flags, *(["--compile"] if how == "compiled" else []))
    assert wrapped["calls"] == (6 if how == "wrapped" else 0), "one forward pass per step"
    assert (counters["stats"]["unique_graphs"] > 1) == (how == "compiled")

    loaded = load_objective(tmp_path / "model")
    set_backend(loaded, "plain")
    if how == "compiled":
        compile_blocks(loaded)
    expected = outputs(trained[0], batch, precision)
    assert_bit_equal(outputs(loaded, batch, precision), expected)
    if how == "plain":
        assert torch.equal(expected[0], outputs(loaded, batch, "fp32")[0]) == (precision == "fp32"), "precision matters"
    names = set(loaded.state_dict())
    assert keys(tmp_path / "model" / "model.safetensors") == names
    checkpoint = tmp_path / "checkpoints" / "step_000006"
    assert keys(checkpoint / "model.safetensors") == names
    moments = keys(checkpoint / "optimizer.safetensors")
    assert {key.rpartition(".")[0] for key in moments} == {name for name, _ in loaded.named_parameters()}
    assert not [key for key in names | moments if "module." in key or "_orig_mod." in key]


def test_from_pretrained_loads_the_saved_model(
    finished_project: Path, answers: dict[str, Any], batch: dict[str, torch.Tensor]
) -> None:
    folder = finished_project / answers["pretrain_ar"]["run"] / "model"
    a, b = load_objective(folder), ARVideo.from_pretrained(folder)
    assert_bit_equal(outputs(a, batch, "fp32"), outputs(b, batch, "fp32"))
