"""A training step reads no value back from the device: on a GPU the host would wait for all work before it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ar_model.objectives import Objective
from tests.helpers.small_arvideo import build, random_batch
from tests.helpers.small_objectives import MODELS, batch_of

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
"""Operations whose results the host needs at once."""


class Reads(TorchDispatchMode):
    """Records the operations that read values of tensors; indexing with a bool mask counts the true values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(getattr(x, "dtype", None) == torch.bool for x in _indices(args))
        if name in READS or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _indices(args: Any) -> list[Any]:
    return args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else []


@pytest.mark.parametrize("name", ["ARVideo", *MODELS])
def test_a_step_reads_no_value_from_the_device(name: str) -> None:
    model: Objective = build() if name == "ARVideo" else MODELS[name]()
    batch = random_batch(2) if name == "ARVideo" else batch_of(2)
    # The first step may make tables.
    model(batch)["loss"].backward()
    with Reads() as reads:
        model(batch)["loss"].backward()
    assert reads.names == []


def test_reads_are_noticed() -> None:
    x = torch.ones(3)
    with Reads() as reads:
        _ = x.sum().item(), x[x > 0], x.nonzero()
    assert len(reads.names) >= 3
