"""Preparation of a network for training: device, attention kernel, activation checkpointing, compilation."""

from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from torch.utils.data import Dataset

from ar_model.attention import set_backend
from ar_model.transformer import compile_blocks, recompute_activations
from data.loading import batches
from pipelines.engine.attention_choice import choose_attention
from pipelines.engine.device import check_compiler
from pipelines.engine.memory import reset_peak_memory
from pipelines.engine.run import Run


class NetworkSettings(Protocol):
    """Settings of the network of a training run."""

    @property
    def attention(self) -> str: ...

    @property
    def compile(self) -> bool: ...

    @property
    def recompute(self) -> bool: ...


def prepare_network(
    run: Run, accelerator: Accelerator, network: nn.Module, dataset: Dataset, config: NetworkSettings
) -> str:
    """Move a network to its device; set attention kernel, activation checkpointing and compilation; return the kernel.

    Args:
        network: maps a batch to losses.
        dataset: its first batch has the shapes for which the kernel is chosen.

    Raises:
        ValueError: if the kernel or the compiler does not work on this machine.
    """
    network.to(accelerator.device)
    if config.compile:
        check_compiler(accelerator.device)
    backend = run.choose(accelerator, "attention", lambda: _attention(accelerator, network, dataset, config))
    # The peak memory of the run excludes the measurement of the kernels.
    reset_peak_memory(accelerator.device)
    set_backend(network, backend)
    if config.recompute:
        recompute_activations(network)
    if config.compile:
        compile_blocks(network)
    return backend


def _attention(accelerator: Accelerator, network: nn.Module, dataset: Dataset, config: NetworkSettings) -> str:
    """Choose the attention kernel for the shapes of the first batch, on the main process, for all processes."""
    chosen = [""]
    if accelerator.is_main_process:
        batch = send_to_device(next(batches(dataset, range(1), workers=0)), accelerator.device)
        # Without pairs there is no contrastive loss, which would wait for the other processes.
        batch.pop("pair_BTHW", None)
        chosen = [choose_attention(accelerator, network, batch, config.attention)]
    return broadcast_object_list(chosen)[0]
