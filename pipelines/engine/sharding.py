"""FSDP version 2, configured by accelerate: each rank keeps a shard of weights, gradients and optimizer moments.

The parameters of a sharded module become DTensors and keep their names. Whole parameters are gathered for forward passes and
checkpoints. Therefore checkpoints are the same with and without FSDP.
"""

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def configured_sharding() -> FullyShardedDataParallelPlugin | None:
    """Return the FSDP settings of the accelerate configuration, or None without FSDP.

    Weights are gathered and gradients are summed in fp32 even for bf16 runs, because autocast then gives the same numbers as
    without FSDP. accelerate's default policy would round even the loss to bf16.

    Raises:
        ValueError: if the configuration does not select FSDP version 2.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    if (version := os.environ.get("FSDP_VERSION", "none")) != "2":
        raise ValueError(f"the accelerate configuration must set fsdp_version: 2 in its fsdp_config, got {version}")
    # cpu_ram_efficient_loading fails on buffers, so every rank builds the whole module before it is sharded.
    fp32 = MixedPrecisionPolicy()
    return FullyShardedDataParallelPlugin(mixed_precision_policy=fp32, cpu_ram_efficient_loading=False)


def name_layers(module: nn.Module) -> None:
    """Set the layers that FSDP shards and gathers as units: the entries of each ModuleList, such as the blocks of an encoder."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    module._no_split_modules = sorted({type(layer).__name__ for layers in lists for layer in layers})  # type: ignore[assignment]


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Enable FSDP for CPU processes. accelerate enables it for GPUs only, but its implementation works on CPUs too."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def whole(value: Tensor) -> Tensor:
    """Gather a DTensor from all ranks; return any other tensor unchanged. All ranks must call this function."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor if `like` is sharded, else the tensor itself."""
    if not isinstance(like, DTensor):
        return value
    shard = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    # The shard is a view, which would keep the whole tensor in memory.
    return shard.clone()
