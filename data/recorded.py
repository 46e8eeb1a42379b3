"""Places that a cache or a run has recorded: found again from any working folder, and after a project was moved."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def to_record(place: str) -> str:
    """Return the absolute path of an existing file or folder; any other text, such as an address, unchanged."""
    path = os.path.expanduser(place)
    return os.path.abspath(path) if os.path.exists(path) else place


def _unknown(place: str) -> bool:
    return False


def locate(recorded: str, *near: str | Path, fits: Callable[[str], bool] = _unknown) -> str:
    """Return where a recorded file or folder is now; the record unchanged if it is nowhere.

    An absolute path is taken as it is if it exists. Otherwise the path, or the end of an absolute one, is looked for in the
    folders `near` and in all folders above them, nearest first, and then in the working folder. The name alone, such as
    `videos`, may be that of something else: a place with only this name in common is returned if it `fits`.
    """
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
