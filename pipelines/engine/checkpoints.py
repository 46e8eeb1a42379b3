"""Checkpoints of safetensors and JSON files, written under a temporary name, then renamed. Old checkpoints are deleted last.

    checkpoints/step_000500/
      model.safetensors       parameters and buffers
      optimizer.safetensors   <parameter>.<state>
      <name>.safetensors      further modules, for example the average of the weights
      state.json              step, seconds, xxh3 of each file above, and a checksum of this file

A folder named step_* is complete. If the newest checkpoint is unreadable or was changed, the previous checkpoint is used.
FSDP checkpoints contain whole tensors too, so a run can be resumed with another number of ranks.
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
"""Errors of reading a damaged checkpoint, whose state.json may contain any JSON."""


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

    All ranks must call this function, because a sharded module is gathered from all ranks; `write` is true on one rank.
    Each module in `extra_modules` is saved in a file named after its key.
    """
    final = folder / f"step_{state['step']:06d}"
    temporary = folder / f".{final.name}.tmp"
    if write:
        _clear(folder)
        temporary.mkdir(parents=True)
    # Save modules before the optimizer: state_dict() makes FSDP free the parameters that a validation has gathered.
    for name, saved_module in {"model": module, **extra_modules}.items():
        tensors = gathered(saved_module.state_dict(), write)
        if write:
            save_file(tensors, temporary / f"{name}.safetensors")
    tensors = gathered(_optimizer_tensors(module, optimizer), write)
    if not write:
        return
    save_file(tensors, temporary / "optimizer.safetensors")
    content = {**state, "xxh3": {file.name: file_hash(file) for file in sorted(temporary.iterdir())}}
    write_json(temporary / "state.json", {**content, "checksum": sha256_of(content)})
    for file in temporary.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    prune(folder, state["step"], keep)


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete unfinished checkpoints, and all but the newest `keep` checkpoints up to `step`.

    Checkpoints after `step` are unreadable (`load` has skipped them). They are neither counted nor deleted.
    """
    _clear(folder)
    for old in [path for path in _complete(folder) if _step(path) <= step][:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.tmp"))


def _clear(folder: Path) -> None:
    for temporary in folder.glob(".step_*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def file_hash(file: Path) -> str:
    """Return the 128-bit XXH3 hash of a file in hex."""
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
    """Restore the newest readable checkpoint and return its state, or None if there is no checkpoint.

    `warn` is called with one line for each unreadable checkpoint.

    Raises:
        ValueError: if all existing checkpoints are unreadable, or the newest readable one belongs to another model.
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
        if file_hash(path / file) != hashes[file]:
            raise ValueError(f"{file} was changed")
    return state


def _complete(folder: Path) -> list[Path]:
    """Return the folders of finished checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Gather tensors from all ranks and return them whole and contiguous; return an empty dictionary if `keep` is false.

    All ranks must call this function. A rank without `keep` holds only one gathered tensor at a time.
    """
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            # A gathered tensor is a copy. On the CPU it takes no GPU memory.
            kept[name] = (value if value is tensor else value.cpu()).contiguous()
    return kept


def _read(file: Path, owner: Callable[[str], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Read the tensors of a file.

    `owner` maps a name to a tensor of the model. If that tensor is sharded and has the same shape, return only this rank's shard.
    """
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
    """Put the values into the optimizer's state, on the devices of their parameters."""
    parameters = _parameters(module)
    for key, value in tensors.items():
        name, _, state_key = key.rpartition(".")
        if name in parameters:
            parameter = parameters[name]
            # The fused optimizer needs moments in the memory layout of the parameter.
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            optimizer.state[parameter][state_key] = value.to(parameter.device)
