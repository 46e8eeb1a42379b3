"""Lookup of the videos that a list file names."""

import functools
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.list_files import Row, shown
from data.segments import Segment
from data.text import appearance, told_apart
from data.video_files import SUFFIXES, status_of


@dataclass(frozen=True)
class Lookup:
    """Rows of a list whose videos exist, with absolute paths and sizes, and the rows whose videos are missing."""

    rows: list[Row]
    paths: list[str]
    sizes: list[int]
    missing: list[Row]


def look_up(file: Path, list_folder: str, rows: Sequence[Row], *, allow_missing: bool = False) -> Lookup:
    """Find the videos that `file` lists.

    A name that does not exist as it is written is tried with ~ for the home folder, with the backslashes of Windows, and in
    other Unicode forms (macOS decomposes letters with accents).

    Raises:
        ValueError: if a video is missing (unless `allow_missing`), cannot be read or is listed twice; names the line.
    """
    real_folder = functools.cache(os.path.realpath)  # folders are few, files are many
    names_of = _NamesOfFolders()
    present, paths, sizes = [], [], []
    missing: list[Row] = []
    line_of: dict[tuple[Any, Segment | None], int] = {}
    repeated: list[tuple[Row, int]] = []
    for row in rows:
        try:
            found = _find(list_folder, row.path, names_of)
        except OSError as error:
            raise ValueError(f"{file}, line {row.line}: {shown(row.path)} cannot be read: {error.strerror}") from None
        if found is None:
            missing.append(row)
            continue
        path, status = found
        if os.path.islink(path) or os.path.basename(path) in ("", ".", ".."):
            path = os.path.realpath(path)
        folder, name = os.path.split(path)
        path = os.path.join(real_folder(folder), name)
        # A file of several names (hard links) has the same device and inode under each.
        file_id = (status.st_dev, status.st_ino) if status.st_nlink > 1 else path
        # Parts of a video are rows of their own.
        first = line_of.setdefault((file_id, segment_of(file, row)), row.line)
        if first != row.line:
            repeated.append((row, first))
        present.append(row)
        paths.append(path)
        sizes.append(status.st_size)
    if missing and not allow_missing:
        row = missing[0]
        if os.path.isdir(os.path.join(list_folder, row.path)):
            problem = f"{shown(row.path)} is a folder, expected a video file"
        else:
            problem = f"no such video: {_advice(list_folder, row.path, names_of)}"
        raise ValueError(f"{file}, line {row.line}: {problem} ({len(missing)} of {len(rows)} are missing)")
    if repeated:
        row, first = repeated[0]
        again = f"lists {shown(row.path)} more than once, first in line {first}"
        raise ValueError(f"{file}, line {row.line}: {again} ({len(repeated)} of {len(rows)} rows repeat a video)")
    return Lookup(present, paths, sizes, missing)


def segment_of(file: Path, row: Row) -> Segment | None:
    """Return the part of the video that a row names. Raises ValueError with the line if start or end is invalid."""
    try:
        return Segment.parse(row.start, row.end)
    except ValueError as error:
        raise ValueError(f"{file}, line {row.line}: {error}") from None


class _NamesOfFolders:
    """Names in folders, by a form in which they are compared. Each folder is read once."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, Callable[[str], str]], dict[str, list[str]]] = {}

    def alike(self, folder: str, name: str, form: Callable[[str], str]) -> list[str]:
        """Return the names in a folder that are equal to `name` in a form; none if the folder cannot be read."""
        if (folder, form) not in self._names:
            names = defaultdict(list)
            try:
                for other in sorted(os.listdir(folder)):
                    names[form(other)].append(other)
            except OSError:
                pass
            self._names[folder, form] = dict(names)
        return self._names[folder, form].get(form(name), [])

    def paths_like(self, folder: str, path: str, form: Callable[[str], str]) -> list[str]:
        """Return the files whose path from a folder has parts that are equal to those of `path` in a form."""
        found = ["/" if os.path.isabs(path) else folder]
        for part in path.split("/"):
            places = []
            for place in found:
                # Names that are equal in all forms need no list of the folder.
                alike = [] if form is _composed and part.isascii() else self.alike(place, part, form)
                exact = [part] if part not in alike and os.path.lexists(os.path.join(place, part)) else []
                places += [os.path.join(place, name) for name in (*exact, *alike)]
            found = places
        return [other for other in found if os.path.isfile(other)]


def _find(list_folder: str, name: str, names_of: _NamesOfFolders) -> tuple[str, os.stat_result] | None:
    """Return the path and status of a listed file; None if it is missing."""
    for written in dict.fromkeys((name, os.path.expanduser(name), name.replace("\\", "/"))):
        path = os.path.join(list_folder, written)
        if (status := status_of(path)) is not None:
            return path, status
    if not name.isascii():
        others = names_of.paths_like(list_folder, name.replace("\\", "/"), _composed)
        if len(others) == 1 and (status := status_of(others[0])) is not None:
            return others[0], status
    return None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _seen(name: str) -> str:
    return appearance(name).casefold()


def _advice(list_folder: str, name: str, names_of: _NamesOfFolders) -> str:
    """Return a missing name and what it hints at, for a message."""
    if any("\udc80" <= character <= "\udcff" for character in name):
        return f"{shown(name)}; the list is not UTF-8"
    if name[1:3] in (":\\", ":/"):
        return f"{shown(name)}; drives of Windows are not known here"
    like = names_of.paths_like(list_folder, name, _seen)
    if like:
        written, *others = told_apart(name, *(os.path.relpath(path, list_folder) for path in like[:2]))
        return f"{shown(written)}; there is {' and '.join(others)}"
    if os.path.splitext(name)[1].lower() not in SUFFIXES:
        return f"{shown(name)}; a path with blanks, quotes or # needs quotes, and a CSV file needs a header with a column path"
    return shown(name)
