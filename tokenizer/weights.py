"""Check of a saved tokenizer before it is built: the configuration of somebody else could describe a network of any size."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

_MAX_CONFIG_BYTES = 2**16


def read_config(file: Path) -> dict[str, Any]:
    """Read the configuration of a tokenizer, a JSON object.

    Raises:
        ValueError: for anything else, or a file that is missing.
    """
    if not file.is_file() or file.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{file.name} is missing, or has more than {_MAX_CONFIG_BYTES} bytes")
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return config


def check_weights(cls: type[nn.Module], config: dict[str, Any], file: Path) -> None:
    """Compare the tensors of a network, built without memory for them, with the header of its safetensors file.

    Raises:
        ValueError: if a setting is invalid, or names or shapes differ.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    with safe_open(file, framework="pt") as opened:
        saved = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    # The hub mixin ignores fields that are no settings.
    settings = {name: value for name, value in config.items() if name in inspect.signature(cls.__init__).parameters}
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in cls(**settings).state_dict().items()}
    for name in sorted(saved.keys() ^ expected.keys()):
        raise ValueError(f"{file.name} {'lacks' if name in expected else 'has an unknown'} {name[:100]!r}")
    for name, shape in expected.items():
        if saved[name] != shape:
            raise ValueError(f"{file.name}: {name} has shape {saved[name]}, expected {shape} by config.json")
