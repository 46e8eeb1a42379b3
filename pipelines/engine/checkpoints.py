"""Checkpoints: safetensors and JSON only, written to another name and renamed, the old ones deleted last.

    checkpoints/step_000500/
      model.safetensors       parameters and buffers
      optimizer.safetensors   <parameter>.<state>
      <name>.safetensors      what else is kept beside the model, as its average
      state.json              step, seconds, xxh3 of each file above, and a checksum of all this

A folder of this name is complete. Where the last one cannot be read, or was changed, the one before it is used. Tensors
are whole, whether the run was sharded (FSDP) or not, so any number of processes can go on from any checkpoint.
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
from pipelines.engine.sharding import share_of, whole

Modules = Mapping[str, nn.Module]


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
    """Write a checkpoint of `state['step']`, with other modules `beside` the model, then delete all but the newest `keep`.

    All processes call this, for a sharded module is gathered from them; one is to `write`.
    """
    final = folder / f"step_{state['step']:06d}"
    temporary = folder / f".{final.name}.tmp"
    if write:
        _clear(folder)
        temporary.mkdir(parents=True)
    # The modules first: to ask for its state dictionary makes a sharded one let go of what an evaluation has gathered.
    for name, kept in {"model": module, **extra_modules}.items():
        tensors = gathered(kept.state_dict(), write)
        if write:
            save_file(tensors, temporary / f"{name}.safetensors")
    tensors = gathered(_optimizer_tensors(module, optimizer), write)
    if not write:
        return
    save_file(tensors, temporary / "optimizer.safetensors")
    hashes = {file.name: _hash(file) for file in sorted(temporary.iterdir())}
    content = {**state, "xxh3": hashes}
    write_json(temporary / "state.json", {**content, "checksum": sha256_of(content)})
    for file in temporary.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    prune(folder, state["step"], keep)


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete what is left of unfinished checkpoints, and of those up to `step` all but the newest `keep`.

    A later one was passed over, so it counts for nothing.
    """
    _clear(folder)
    for old in [path for path in _complete(folder) if _step(path) <= step][:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.tmp"))


def _clear(folder: Path) -> None:
    for left_over in folder.glob(".step_*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as handle:
        while part := handle.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def load(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    extra_modules: Modules,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Restore the newest readable checkpoint; returns its state, or None if there is none.

    `tell` is called with a line for each that is passed over.

    Raises:
        ValueError: if checkpoints exist but none can be read, or it is of another model.
    """
    found = _complete(folder)
    parameters = _parameters(module)
    modules = {"model": module, **extra_modules}
    for path in reversed(found):
        try:
            state = _read_state(path, [f"{name}.safetensors" for name in (*modules, "optimizer")])
            weights = {
                name: _read(path / f"{name}.safetensors", kept.state_dict().get) for name, kept in modules.items()
            }
            moments = _read(path / "optimizer.safetensors", lambda key: parameters.get(key.rpartition(".")[0]))
        except (
            OSError,
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
            RecursionError,
            SafetensorError,
        ) as error:  # any JSON may be there
            tell(f"{path}: passed over, it cannot be read ({' '.join(str(error).split())[:200]})")
            continue
        for name, kept in modules.items():
            try:
                kept.load_state_dict(weights[name], strict=True)
            except RuntimeError as error:
                raise ValueError(f"{path}: is of another model ({' '.join(str(error).split())[:200]})") from None
        _restore_optimizer(module, optimizer, moments)
        return state
    if found:
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints can be read")
    return None


def _read_state(path: Path, files: Sequence[str]) -> dict[str, Any]:
    """What was saved beside the tensors. Whatever JSON is there instead gives one of the errors that `load` catches.

    Raises:
        ValueError: if it was changed, or one of the files.
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
    found = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole, contiguous tensors; those of a sharded module are gathered one after another, and dropped unless `keep`."""
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            kept[name] = (value if value is tensor else value.cpu()).contiguous()
    return kept


def _read(file: Path, owner: Callable[[str], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The tensors of a file; of one whose owner is sharded, and equally large, what belongs to this process."""
    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # it is no dictionary
            value, like = opened.get_tensor(name), owner(name)
            tensors[name] = value if like is None or like.shape != value.shape else share_of(value, like)
    return tensors


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """By their names in the state dictionary."""
    return fsdp2_canonicalize_names(dict(module.named_parameters()))


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in _parameters(module).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach()
    return tensors


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = _parameters(module)
    for key, value in tensors.items():
        name, _, what = key.rpartition(".")
        if name in parameters:
            optimizer.state[parameters[name]][what] = _beside(value, parameters[name])


def _beside(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A value of the fused optimizer, which wants counters on the parameter's device and moments in its memory layout."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
