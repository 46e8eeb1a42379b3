"""What can be set: a dataclass for each command. Nothing in this folder imports torch, so `--help` is fast."""

from collections.abc import Callable
from dataclasses import field
from typing import Any


def class_setting(load: Callable[[], tuple[Any, type]], text: str) -> Any:
    """Declare a setting whose value is a class with settings of its own: `--NAME CLASS --NAME.setting value`.

    Args:
        load: returns the type that a class must have and the default class; called only when flags are parsed, since it
            imports torch.
        text: the line of `--help`.
    """
    return field(default_factory=lambda: load()[1], metadata={"help": text, "load": load})
