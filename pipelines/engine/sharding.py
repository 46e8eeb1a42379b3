"""FSDP as accelerate configures it, version 2 only: each process keeps a part of the weights, gradients and moments.

The parameters of a sharded module are DTensors under their old names. Their whole values are gathered for a forward pass, and
here, one after another, for checkpoints, which do not tell whether a run was sharded.
"""

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def configured_sharding() -> FullyShardedDataParallelPlugin | None:
    """What the accelerate configuration asks for; None: no FSDP.

    Weights are gathered and gradients summed in fp32, in bf16 too, so that autocast gives the numbers that it gives without
    FSDP; accelerate's own policy would round even the loss.

    Raises:
        ValueError: for FSDP version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("the accelerate configuration asks for FSDP version 1: set fsdp_version: 2 in its fsdp_config")
    # Every process makes the whole module before it is cut; the other way stumbles over buffers.
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False
    )


def name_layers(module: nn.Module) -> None:
    """Tell accelerate what is gathered at once: each entry of a list of modules, as the blocks of an encoder are."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    module._no_split_modules = sorted({type(layer).__name__ for layers in lists for layer in layers})  # type: ignore[assignment]


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Switch FSDP on for processes on the CPU; accelerate does so for GPUs only, but all that it does then works here too."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def whole(value: Tensor) -> Tensor:
    """A tensor gathered from all processes, which must all ask for it; any other tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor belongs to this process if `like` is cut; the tensor itself if it is not."""
    if not isinstance(like, DTensor):
        return value
    cut = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut.clone()  # the cut is a view, and would keep the whole
