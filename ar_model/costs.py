"""FLOPs and memory of a training step, from a trace with fake tensors (tensors that have a shape but no data)."""

import weakref
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ar_model.attention_mask import forget_masks

aten = torch.ops.aten

Build = Callable[[], tuple[nn.Module, Callable[[], object]]]
"""Function that returns a module and its training step, both with CPU tensors."""


@dataclass(frozen=True)
class Cost:
    """Cost of a training step that is not the first of its run. Memory is in bytes."""

    flop: int
    """FLOPs of matrix products, convolutions and attention. A multiply-add counts as two."""
    weights: int
    """Memory of parameters and buffers."""
    gradients: int
    """Memory of all gradients together."""
    state: int
    """Memory that remains allocated after the first step: the optimizer's moments."""
    others: int
    """Peak memory of everything else: activations, temporaries, the batch."""
    peak: int
    """Peak memory of everything. It is less than the sum of the parts if activations are freed before all gradients exist."""


def cost_of(build: Build) -> Cost:
    """Call `build`, trace two of its training steps and return the cost of the second.

    Nothing is computed and almost no memory is used. The step may use tensors that exist before the call, including bool masks
    as indices, but it cannot read the values of tensors that it creates.
    """
    with ExitStack() as stack, FakeTensorMode(allow_non_fake_inputs=True), _Trace() as trace:
        # A trace must not use cached real masks, and later steps must not use the fake masks that the trace has cached.
        forget_masks()
        stack.callback(forget_masks)
        module, step = build()
        built = trace.live
        step()
        state = trace.live - built
        sizes: dict[int, int] = {}

        def record_gradient(parameter: Tensor) -> None:
            if parameter.grad is not None:
                storage = parameter.grad.untyped_storage()
                sizes[trace.track(storage)] = storage.nbytes()

        for parameter in module.parameters():
            if parameter.requires_grad:
                stack.enter_context(parameter.register_post_accumulate_grad_hook(record_gradient))
        trace.begin()
        step()
        weights = sum(s.nbytes() for s in {x.untyped_storage() for x in (*module.parameters(), *module.buffers())})
    gradients, others = sum(sizes.values()), trace.peak(without=sizes) - weights - state
    return Cost(trace.flop, weights, gradients, state, others, peak=trace.peak())


class _Trace(TorchDispatchMode):
    """Dispatch mode that counts FLOPs and tracks the memory of all tensor storages."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes of all storages that are alive."""
        self.flop = 0
        """FLOPs since `begin`."""
        self._storages: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._count = self._start = 0
        self._changes: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Reset the count of FLOPs and the peak memory."""
        self._start, self._changes, self.flop = self.live, [], 0

    def peak(self, without: Container[int] = ()) -> int:
        """Return the peak number of bytes since `begin`, excluding the storages whose ids are in `without`."""
        live = peak = self._start
        for storage_id, change in self._changes:
            if storage_id not in without:
                live += change
                peak = max(peak, live)
        return peak

    def track(self, storage: torch.UntypedStorage) -> int:
        """Return the id of a storage. The memory of a new storage counts until it is freed."""
        # An address may be reused after its storage is freed, so ids are not addresses.
        address = storage._cdata
        if address in self._storages:
            return self._storages[address][0]
        self._count += 1
        storage_id, size = self._count, storage.nbytes()

        def freed(_: object) -> None:
            del self._storages[address]
            self._change(storage_id, -size)

        self._storages[address] = storage_id, weakref.ref(storage, freed)
        self._change(storage_id, size)
        return storage_id

    def _change(self, storage_id: int, change: int) -> None:
        self.live += change
        self._changes.append((storage_id, change))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Operations on real masks return real masks, because these may be used as indices.
        if tensors and all(map(_is_real_mask, tensors)):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if func in _INDEXING:
            args = (args[0], _integer_indices(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf.untyped_storage())
        return out


# FlopCounterMode is not used, because it keeps tensors alive that a step would free. Its registry lacks CPU flash attention.
_FLASH, _FLASH_BACKWARD = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward
_FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_FLASH],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_FLASH_BACKWARD],
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _is_real_mask(x: Tensor) -> bool:
    return x.dtype == torch.bool and not isinstance(x, FakeTensor)


def _integer_indices(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace real bool masks by their integer indices, because the shape of a result depends on the values of a mask."""
    integers: list[Tensor | None] = []
    for index in indices:
        if index is not None and _is_real_mask(index):
            with unset_fake_temporarily():
                integers += index.nonzero(as_tuple=True)
        else:
            integers.append(index)
    return integers
