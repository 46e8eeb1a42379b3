"""What a step of a module costs, found by tracing it with tensors that have shapes and no numbers."""

import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ar_model.backends import forget_masks

Build = Callable[[], tuple[nn.Module, Callable[[], object]]]
"""Makes a module, and a step on it, of CPU tensors."""


@dataclass(frozen=True)
class Cost:
    """Of one step, when another has been before it. Memory in bytes."""

    flop: int
    """Operations of matrix products, convolutions and attention; a multiplication with its addition are two."""
    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of all parameters that get one."""
    state: int
    """What the step before has left behind: the optimizer's moments."""
    others: int
    """The most that everything else takes at a time: activations, temporaries, the batch."""
    peak: int
    """The most that all takes at a time; less than the sum where gradients come when activations are gone."""


def cost_of(build: Build) -> Cost:
    """Trace two steps of what `build` makes, and say what the second costs.

    Nothing is computed and next to no memory is taken. Build and step may use tensors that were there before (masks among
    them may choose), but cannot read a number of one that they make.
    """
    with _no_masks_kept(), FakeTensorMode(allow_non_fake_inputs=True), _Watch() as watch:
        module, step = build()
        made = watch.live
        step()
        state = watch.live - made
        gradients: dict[int, int] = {}

        def note(parameter: Tensor) -> None:
            if parameter.grad is not None:
                storage = parameter.grad.untyped_storage()
                gradients[watch.see(storage)] = storage.nbytes()

        hooks = [p.register_post_accumulate_grad_hook(note) for p in module.parameters() if p.requires_grad]
        watch.begin()
        step()
        for hook in hooks:
            hook.remove()
        weights = sum(s.nbytes() for s in {x.untyped_storage() for x in (*module.parameters(), *module.buffers())})
    return Cost(
        flop=watch.flop,
        weights=weights,
        gradients=sum(gradients.values()),
        state=state,
        others=watch.peak(without=gradients) - weights - state,
        peak=watch.peak(),
    )


@contextmanager
def _no_masks_kept() -> Iterator[None]:
    """Attention keeps its masks: those of a trace must not be met by a real step."""
    forget_masks()
    try:
        yield
    finally:
        forget_masks()


class _Watch(TorchDispatchMode):
    """Counts operations, and sees the memory of every tensor come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes."""
        self.flop = 0
        """Since `begin`."""
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._count = self._start = 0
        self._changes: list[tuple[int, int]] = []

    def begin(self) -> None:
        """`peak` starts from what is there now."""
        self._start, self._changes, self.flop = self.live, [], 0

    def peak(self, without: Container[int] = ()) -> int:
        """Most bytes at a time since `begin`, without some of what has come since then."""
        live = most = self._start
        for number, change in self._changes:
            if number not in without:
                live += change
                most = max(most, live)
        return most

    def see(self, storage: torch.UntypedStorage) -> int:
        """The number of what lies there."""
        place = storage._cdata
        if place in self._known:
            return self._known[place][0]
        self._count += 1
        number, size = self._count, storage.nbytes()

        def gone(_: object) -> None:
            del self._known[place]
            self._change(number, -size)

        self._known[place] = number, weakref.ref(storage, gone)
        self._change(number, size)
        return number

    def _change(self, number: int, change: int) -> None:
        self.live += change
        self._changes.append((number, change))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and all(map(_is_real_mask, tensors)):  # what is made of masks that are there is there too
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if func in _CHOOSING:
            args = (args[0], _places(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf.untyped_storage())
        return out


_FORMULAS = {  # a FlopCounterMode would keep some of what it sees alive
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_backward]
    ),
}

_CHOOSING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


def _is_real_mask(x: Tensor) -> bool:
    return x.dtype == torch.bool and not isinstance(x, FakeTensor)


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """The places that real masks choose: their number decides what shape comes out."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is not None and _is_real_mask(index):
            with unset_fake_temporarily():
                places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return places
