"""Check of a saved model before it is built: the configuration of somebody else could describe a model of any size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

MAX_CONFIG_BYTES = 2**16
_MAX_BUFFER_BYTES = 2**27
"""Limit for buffers that are computed from the configuration, such as encodings of positions."""


def read_config(file: Path, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read the configuration of a model, a JSON object of at most `most` bytes. Raises a ValueError for anything else."""
    if not file.is_file() or file.stat().st_size > most:
        raise ValueError(f"{file.name} is missing, or has more than {most} bytes")
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return config


def check_weights(build: Callable[[], nn.Module], file: Path) -> None:
    """Compare the tensors of a model, built without memory for them, with the header of its safetensors file.

    Raises a ValueError if names or shapes differ, or if buffers that are not saved would be large.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    with safe_open(file, framework="pt") as opened:
        saved = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    with torch.device("meta"):
        model = build()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(saved.keys() ^ expected.keys()):
        raise ValueError(f"{file.name} {'lacks' if name in expected else 'has an unknown'} {name[:100]!r}")
    for name, shape in expected.items():
        if saved[name] != shape:
            raise ValueError(f"{file.name}: {name} has shape {saved[name]}, expected {shape} by config.json")
    computed = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in expected)
    if computed > _MAX_BUFFER_BYTES:
        raise ValueError(f"config.json describes buffers of {computed} bytes, at most {_MAX_BUFFER_BYTES} are allowed")
