"""CUDA kernels without a GPU: biases, loading of xformers, graphs and masks of FlexAttention."""

import ctypes
import functools
import importlib
import sys
import types
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ar_model import cuda_backends
from ar_model.attention import set_backend
from ar_model.attention_mask import BlockMask
from ar_model.backends import BACKENDS
from ar_model.cuda_backends import flex_anywhere, import_xformers, xformers_bias
from ar_model.transformer import compile_blocks
from tests.helpers.small_arvideo import build, random_batch


class FakeOps:
    """Stand-in for xformers.ops."""

    class LowerTriangularMask:
        pass


@pytest.mark.parametrize("mask", [BlockMask(5, 3, 7), BlockMask(15, 25, 20), BlockMask(2, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_xformers_is_the_mask_in_aligned_rows(mask: BlockMask, dtype: torch.dtype) -> None:
    q, k = (torch.zeros(2, mask.blocks * n, 3, 16, dtype=dtype) for n in (mask.queries, mask.keys))
    bias = xformers_bias(FakeOps, q, k, mask)
    assert bias.shape == (2, 3, q.shape[1], k.shape[1]) and bias.dtype == dtype
    visible = mask.visible(torch.device("cpu"))
    assert torch.equal(bias == 0, visible.expand_as(bias)) and torch.equal(bias == -torch.inf, ~visible.expand_as(bias))
    # The kernels require strides that are multiples of 8 elements, except along the keys.
    assert bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1])


def test_xformers_needs_no_bias_without_a_mask_and_for_causal_masks() -> None:
    x = torch.zeros(1, 6, 2, 16)
    assert xformers_bias(FakeOps, x, x, None) is None
    assert isinstance(xformers_bias(FakeOps, x, x, BlockMask(6, 1, 1)), FakeOps.LowerTriangularMask)


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Put a fake xformers and a fake CUDA runtime in place; return the list of libraries that are loaded, with their modes."""
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    loaded: list[tuple[str, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode=0: loaded.append((path, mode)))
    runtime = types.SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr(cuda_backends, "distribution", lambda name: {"nvidia-cuda-runtime-cu12": runtime}[name])
    import_xformers.cache_clear()
    return loaded


@pytest.mark.parametrize("cuda, loads", [("13.0", True), ("12.8", False), (None, True)])
def test_the_cuda_12_runtime_is_loaded_globally_unless_pytorch_brings_it(
    monkeypatch: pytest.MonkeyPatch, fake_xformers: list[tuple[str, int]], cuda: str | None, loads: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert import_xformers() is sys.modules["xformers.ops"]
    assert [(Path(path).name, mode) for path, mode in fake_xformers] == [
        ("libcudart.so.12", ctypes.RTLD_GLOBAL)
    ] * loads
    import_xformers.cache_clear()


@pytest.mark.parametrize("error", [PackageNotFoundError, OSError])
def test_xformers_is_imported_without_the_cuda_12_runtime_too(
    monkeypatch: pytest.MonkeyPatch, fake_xformers: list[tuple[str, int]], error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error("missing")

    monkeypatch.setattr(*((ctypes, "CDLL") if error is OSError else (cuda_backends, "distribution")), fail)
    assert import_xformers() is sys.modules["xformers.ops"]
    import_xformers.cache_clear()


@pytest.mark.parametrize("settings", [{}, {"decoder_self": True}])
@pytest.mark.parametrize("tried_before", [False, True], ids=["first use in a graph", "after a trial"])
def test_a_compiled_block_with_flex_is_one_graph(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tried_before: bool
) -> None:
    """FlexAttention has no backward pass on CPUs: the forward pass is traced here, but not compiled."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(cuda_backends, "_compiled_flex", lambda: importlib.import_module(FLEX).flex_attention)
    monkeypatch.setattr(cuda_backends, "_FLEX_MASKS", {})
    monkeypatch.setitem(BACKENDS, "flex", flex_anywhere)
    model, batch = build(depth=3, decoder_depth=3, **settings).train(), random_batch(2)
    with torch.no_grad():
        expected = model(batch)["loss"]
        set_backend(model, "flex")
        if tried_before:
            assert torch.allclose(model(batch)["loss"], expected, atol=1e-5)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_blocks(model)
        for _ in range(2):
            assert torch.allclose(model(batch)["loss"], expected, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


FLEX = "torch.nn.attention.flex_attention"


def test_a_flex_mask_made_in_inference_mode_works_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backends, "_FLEX_MASKS", {})
    mask, device = BlockMask(3, 2, 4), torch.device("cpu")
    with torch.inference_mode():
        first = cuda_backends._flex_mask(mask, device)
    assert cuda_backends._flex_mask(mask, device) is first
    assert not first.kv_num_blocks.is_inference() and not first.kv_indices.is_inference()
    assert cuda_backends._flex_mask(None, device) is None
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(12), indexing="ij")
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(first.mask_mod(zero, zero, rows, columns), mask.visible(device))
