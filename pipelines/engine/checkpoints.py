"""Checkpoints: safetensors and JSON only, written under a temporary name, then renamed. Old ones are deleted last.

    checkpoints/step_000500/
      model.safetensors       parameters and buffers
      optimizer.safetensors   <parameter>.<state>
      <name>.safetensors      further modules, for example the average of the weights
      state.json              step, seconds, xxh3 of each file above, and a checksum of this file

A folder of this name is complete. If the newest checkpoint is unreadable or was changed, the previous one is used.
Tensors are stored whole, with FSDP too, so that any number of ranks can continue from any checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data.files import sha256_of, sync_folder, write_json
from data.text import one_line
from pipelines.engine.sharding import share_of, whole

Modules = Mapping[str, nn.Module]
_READ_BYTES = 2**22
_UNREADABLE = (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, SafetensorError)
"""Errors from reading a checkpoint; state.json may contain any JSON."""


def save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    extra_modules: Modules,
    keep: int,
    write: bool = True,
) -> None:
    """Write a checkpoint of `state['step']`, then delete all but the newest `keep` checkpoints.

    All ranks call this, because a sharded module is gathered from all of them; `write` is true on one rank. Each of
    `extra_modules` is saved in a file of its name.
    """
    final = folder / f"step_{state['step']:06d}"
    temporary = folder / f".{final.name}.tmp"
    if write:
        _clear(folder)
        temporary.mkdir(parents=True)
    # Modules before the optimizer: state_dict() makes FSDP free the parameters that an evaluation has gathered.
    for name, saved_module in {"model": module, **extra_modules}.items():
        tensors = gathered(saved_module.state_dict(), write)
        if write:
            save_file(tensors, temporary / f"{name}.safetensors")
    tensors = gathered(_optimizer_tensors(module, optimizer), write)
    if not write:
        return
    save_file(tensors, temporary / "optimizer.safetensors")
    content = {**state, "xxh3": {file.name: _hash(file) for file in sorted(temporary.iterdir())}}
    write_json(temporary / "state.json", {**content, "checksum": sha256_of(content)})
    for file in temporary.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    prune(folder, state["step"], keep)


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete unfinished checkpoints, and all but the newest `keep` of those up to `step`.

    Later checkpoints were skipped as unreadable, so they do not count.
    """
    _clear(folder)
    for old in [path for path in _complete(folder) if _step(path) <= step][:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.tmp"))


def _clear(folder: Path) -> None:
    for temporary in folder.glob(".step_*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as handle:
        while part := handle.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def load(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    extra_modules: Modules,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Restore the newest readable checkpoint; return its state, or None if there is no checkpoint.

    `warn` gets one line for each checkpoint that is skipped.

    Raises:
        ValueError: if no existing checkpoint is readable, or it belongs to another model.
    """
    folders = _complete(folder)
    parameters = _parameters(module)
    modules = {"model": module, **extra_modules}
    for path in reversed(folders):
        try:
            state = _read_state(path, [f"{name}.safetensors" for name in (*modules, "optimizer")])
            weights = {
                name: _read(path / f"{name}.safetensors", target.state_dict().get) for name, target in modules.items()
            }
            moments = _read(path / "optimizer.safetensors", lambda key: parameters.get(key.rpartition(".")[0]))
        except _UNREADABLE as error:
            warn(f"{path}: skipped, it cannot be read ({one_line(error, 200)})")
            continue
        for name, target in modules.items():
            try:
                target.load_state_dict(weights[name], strict=True)
            except RuntimeError as error:
                raise ValueError(f"{path}: belongs to another model ({one_line(error, 200)})") from None
        _restore_optimizer(module, optimizer, moments)
        return state
    if folders:
        raise ValueError(f"{folder}: none of its {len(folders)} checkpoints can be read")
    return None


def _read_state(path: Path, files: Sequence[str]) -> dict[str, Any]:
    """Read the state of a checkpoint and verify the checksums. Unexpected JSON raises one of `_UNREADABLE`.

    Raises:
        ValueError: if state.json or one of the files was changed.
    """
    state = json.loads((path / "state.json").read_text())
    if state.pop("checksum") != sha256_of(state) or path.name != f"step_{state['step']:06d}":
        raise ValueError("state.json was changed")
    hashes = state.pop("xxh3")
    for file in files:
        if _hash(path / file) != hashes[file]:
            raise ValueError(f"{file} was changed")
    return state


def _complete(folder: Path) -> list[Path]:
    """Return the folders of finished checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Return whole, contiguous tensors; an empty dictionary unless `keep`.

    Tensors of a sharded module are gathered one after another, and dropped at once unless `keep`.
    """
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            # A gathered tensor is a copy; it waits on the CPU.
            kept[name] = (value if value is tensor else value.cpu()).contiguous()
    return kept


def _read(file: Path, owner: Callable[[str], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Read the tensors of a file. If the owner of a tensor is sharded and of the same shape, keep this rank's shard only."""
    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            value, like = opened.get_tensor(name), owner(name)
            tensors[name] = value if like is None or like.shape != value.shape else share_of(value, like)
    return tensors


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names in the state dictionary."""
    return fsdp2_canonicalize_names(dict(module.named_parameters()))


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in _parameters(module).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach()
    return tensors


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Move the values for the fused optimizer: counters to the device of the parameter, moments to its memory layout too."""
    parameters = _parameters(module)
    for key, value in tensors.items():
        name, _, state_key = key.rpartition(".")
        if name in parameters:
            parameter = parameters[name]
            moment = value.shape == parameter.shape
            placed = (
                torch.empty_like(parameter, requires_grad=False).copy_(value) if moment else value.to(parameter.device)
            )
            optimizer.state[parameter][state_key] = placed
