"""Flags of the commands, one dataclass each. Nothing in this folder imports torch, so `--help` is fast."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

from data.clip_spec import ClipSpec
from data.sources import BUILTIN


def class_setting(load: Callable[[], tuple[Any, type]]) -> Any:
    """Declare a setting whose value is a class with settings of its own: `--NAME CLASS --NAME.setting value`.

    `load` returns the required type and the default class. It imports torch, so it is not called for `--help`.
    """
    return field(default_factory=lambda: load()[1], metadata={"load": load})


def recorded_in(runs: str, default: Callable[[], Any]) -> Any:
    """Declare a group of settings whose defaults are those of earlier runs, if the setting `runs` names run folders.

    If the runs differ, or name no run folder, the defaults are those of `default()`.
    """
    return field(default_factory=default, metadata={"recorded_in": runs})


def check_at_least_1(settings: object, *names: str) -> None:
    """Raise a ValueError if one of the named settings is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")


def check_clip(videos: str, clip: ClipSpec, *, dense: bool = False) -> None:
    """Raise a ValueError if clips are dense where they cannot be, or have another frame rate than videos without one."""
    if clip.views == "dense" and not dense:
        raise ValueError("clip.views must be a number, got dense: only tokenize cuts dense views")
    for name, value in (("fps", clip.fps), ("seconds", clip.seconds)):
        if value is not None and videos.startswith(BUILTIN):
            raise ValueError(f"clip.{name} must be null for {videos}, which has no frame rate, got {value:g}")
