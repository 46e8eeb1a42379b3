"""Activation checkpointing and compilation change neither the results nor the parameter names. Masks are respected."""

import functools
import itertools
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ar_model.attention import set_backend
from ar_model.attention_mask import BlockMask
from ar_model.objectives import ARVideo, load_objective
from ar_model.transformer import AttentionContext, CrossDecoder, Encoder, compile_blocks, recompute_activations
from tests.helpers.small_arvideo import Batch, build, random_batch


class LiveMemory(TorchDispatchMode):
    """Tracks the bytes of all tensors that operations returned and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if storage() is not None)


def step(model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor], int]:
    """Return the loss, the gradients, and the bytes that are alive between the forward and the backward pass."""
    with LiveMemory() as memory:
        loss = model(batch)["loss"]
        saved = memory.bytes()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters()))), saved


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize(
    "settings", [{}, {"decoder_self": True, "ranks": 0.5, "rope": False}, {"input": "pixels", "target": "pixels"}]
)
def test_checkpointing_gives_equal_numbers_with_less_memory(settings: dict[str, Any], backend: str) -> None:
    model, batch = build(**settings, depth=4).train(), random_batch(8)
    set_backend(model, backend)
    loss, gradients, saved = step(model, batch)
    recompute_activations(model)
    loss_again, gradients_again, saved_again = step(model, batch)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert saved_again < saved / 2


def test_checkpointing_runs_every_block_twice_in_training_and_once_without_gradients() -> None:
    model, batch = build(decoder_self=True).train(), random_batch(2)
    calls: list[nn.Module] = []
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.mlp.register_forward_pre_hook(lambda m, args: calls.append(m))
    recompute_activations(model)
    model(batch)["loss"].backward()
    assert len(calls) == 8 and len(set(calls)) == 4
    calls.clear()
    with torch.no_grad():
        model(batch)
    assert len(calls) == 4


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def assert_same_step(model: ARVideo, other: ARVideo, batch: Batch) -> None:
    loss, gradients, _ = step(model, batch)
    other_loss = other(batch)["loss"]
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(other_loss, list(other.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_has_the_same_names_and_numbers_and_can_be_loaded(tmp_path: Path) -> None:
    """Only the encoder is compiled, because each kind of block takes ten seconds unless it is in the compiler's cache."""
    plain, compiled, batch = build().train(), build().train(), random_batch(2)
    compile_blocks(compiled.encoder)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert_same_step(plain, compiled, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    compiled.save(tmp_path / "model")
    loaded = load_objective(tmp_path / "model")
    assert list(loaded.state_dict()) == list(plain.state_dict())
    assert torch.equal(decoder_output(loaded, batch), decoder_output(plain.eval(), batch))


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"decoder_self": True, "rope": False}])
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_have_no_graph_breaks_and_equal_blocks_share_a_graph(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], backend: str
) -> None:
    """With a graph per block, a deep model would exceed dynamo's recompilation limit. Blocks are only traced here."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    plain, compiled = (build(depth=3, decoder_depth=3, **settings).train() for _ in range(2))
    batch = random_batch(2)
    for model in (plain, compiled):
        set_backend(model, backend)
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert_same_step(plain, compiled, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def decoder_output(model: Any, batch: Batch) -> Tensor:
    outputs: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda m, args, out: outputs.append(out))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return outputs[0]


def test_every_block_is_compiled_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    compile_blocks(build(depth=3, decoder_depth=2))
    assert compiled == ["Block"] * 3 + ["CrossBlock"] * 2


def test_the_decoder_has_self_attention_only_with_decoder_self() -> None:
    assert not [name for name in build().state_dict() if "self" in name]
    names = [name for name in build(decoder_self=True).state_dict() if "self" in name]
    layers = ["norm", "attention.q", "attention.kv", "attention.out"]
    parts = itertools.product(range(2), layers, ("weight", "bias"))
    assert sorted(names) == sorted(f"decoder.blocks.{block}.self_{layer}.{part}" for block, layer, part in parts)


def dependencies(run: Callable[[Tensor], Tensor], x_1LD: Tensor) -> Tensor:
    """Return a bool tensor (outputs, inputs) that is true where an output token depends on an input token."""
    jacobian = torch.autograd.functional.jacobian(run, x_1LD)  # (1, outputs, D, 1, inputs, D)
    assert isinstance(jacobian, Tensor)
    return (jacobian != 0).any(5).any(2)[0, :, 0]


@pytest.mark.parametrize("with_self", [False, True])
def test_decoder_queries_depend_exactly_on_what_the_masks_allow(with_self: bool) -> None:
    torch.manual_seed(0)
    decoder = CrossDecoder(8, 2, 2, 6, with_self=with_self)
    query, context = torch.randn(1, 6, 8), torch.randn(1, 9, 6)
    mask, self_mask = BlockMask(3, 2, 3), BlockMask(3, 2, 2)
    attention_context = AttentionContext(mask=mask, self_mask=self_mask)
    on_context = dependencies(lambda x: decoder(query, x, attention_context), context)
    assert torch.equal(on_context, mask.visible(context.device))
    on_queries = dependencies(lambda x: decoder(x, context, attention_context), query)
    assert torch.equal(on_queries, self_mask.visible(query.device) if with_self else torch.eye(6, dtype=torch.bool))


def test_encoder_tokens_depend_exactly_on_what_the_mask_allows() -> None:
    torch.manual_seed(0)
    encoder, x, mask = Encoder(8, 3, 2), torch.randn(1, 8, 8), BlockMask(4, 2, 2)
    for layer in range(3):
        assert torch.equal(dependencies(lambda x: encoder(x, mask)[layer], x), mask.visible(x.device))  # noqa: B023
    assert dependencies(lambda x: encoder(x)[0], x).all()
