"""Places that a cache or a run has recorded: found again from any working folder, and after a project was moved."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

GROUPS = "?group=folder"
"""Option after the name of a folder of videos, see `data.sources.load_source`."""


def without_option(place: str) -> tuple[str, str]:
    """Return the name of a folder of videos and its option, empty if there is none. A name may end like the option."""
    if place.endswith(GROUPS) and not os.path.lexists(os.path.expanduser(place)):
        return place.removesuffix(GROUPS), GROUPS
    return place, ""


def to_record(place: str) -> str:
    """Return the absolute path of an existing file or folder; any other text, such as an address, unchanged."""
    place, option = without_option(place)
    path = os.path.expanduser(place)
    return (os.path.abspath(path) if os.path.exists(path) else place) + option


def _unknown(place: str) -> bool:
    return False


def locate(recorded: str, *near: str | Path, fits: Callable[[str], bool] = _unknown) -> str:
    """Return where a recorded file or folder is now; the record unchanged if it is nowhere.

    An absolute path is taken as it is if it exists. Otherwise the path, or the end of an absolute one, is looked for in the
    folders `near` and in all folders above them, nearest first, and then in the working folder. The name alone, such as
    `videos`, may be that of something else: a place with only this name in common is returned if it `fits`.
    """
    recorded, option = without_option(recorded)
    return _locate(recorded, near, lambda place: fits(place + option)) + option


def _locate(recorded: str, near: tuple[str | Path, ...], fits: Callable[[str], bool]) -> str:
    path = Path(os.path.expanduser(recorded))
    if path.is_absolute() and os.path.exists(path):
        return str(path)
    # A moved project keeps its layout, so the longest end of an old absolute path is the best.
    ends = [path.parts[start:] for start in range(1, len(path.parts))] if path.is_absolute() else [path.parts]
    for end in filter(None, ends):
        for base in _bases(near):
            found = os.path.join(base, *end)
            if os.path.exists(found) and (len(end) > 1 or not path.is_absolute() or fits(found)):
                return found
    return recorded


def _bases(near: tuple[str | Path, ...]) -> Iterator[Path]:
    for place in near:
        folder = Path(os.path.abspath(place))
        yield from (folder, *folder.parents)
    yield Path()
