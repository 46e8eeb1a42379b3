"""Checkpoints: safetensors and JSON only, written to another name and renamed, the old ones deleted last.

    checkpoints/step_000500/
      model.safetensors       parameters and buffers
      optimizer.safetensors   <parameter>.<state>
      <name>.safetensors      what else is kept beside the model, as its average
      state.json              step, seconds

A folder of this name is complete. Where the last one cannot be read the one before it is used.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data.files import write_json

Modules = Mapping[str, nn.Module]


def save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    beside: Modules,
    keep: int,
) -> None:
    """Write a checkpoint of `state['step']`, with other modules `beside` the model, then delete all but the newest `keep`."""
    final = folder / f"step_{state['step']:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, kept in {"model": module, **beside}.items():
        save_file({k: v.contiguous() for k, v in kept.state_dict().items()}, temporary / f"{name}.safetensors")
    save_file(_optimizer_tensors(module, optimizer), temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", state)
    for file in temporary.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)


def load(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, beside: Modules
) -> dict[str, Any] | None:
    """Restore the newest readable checkpoint; returns its state, or None if there is none.

    Raises:
        ValueError: if checkpoints exist but none can be read.
    """
    found = _complete(folder)
    for path in reversed(found):
        try:
            state = json.loads((path / "state.json").read_text())
            modules = {"model": module, **beside}
            weights = {name: load_file(path / f"{name}.safetensors") for name in modules}
            moments = load_file(path / "optimizer.safetensors")
        except (OSError, ValueError, SafetensorError):
            continue
        for name, kept in modules.items():
            kept.load_state_dict(weights[name], strict=True)
        _restore_optimizer(module, optimizer, moments)
        return state
    if found:
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None


def _complete(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach().contiguous()
    return tensors


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        state = {
            key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.rpartition(".")[0] == name
        }
        if state:
            optimizer.state[parameter] = {key: _beside(value, parameter) for key, value in state.items()}


def _beside(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A value of the fused optimizer, which wants counters on the parameter's device and moments in its memory layout."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
