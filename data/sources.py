"""Sources of videos: a folder, a list file or a built-in set, read into one sorted list of `Video`."""

import functools
import hashlib
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from data.list_files import COLUMNS, Row, read_list, shown
from data.text import printable

_SUFFIXES = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"
SUFFIXES = frozenset(_SUFFIXES.split())
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLITS = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
_LIKE_A_SPLIT = re.compile(rf"({'|'.join(_SPLITS)})([^a-z].*)?", re.DOTALL)
"""Names such as val_256, in lower case."""
BUILTIN = "builtin:"
_SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found", "lost.dir", "found.000"),
    *("~snapshot", "@tmp", "network trash folder", "temporary items"),
}
"""Folders that operating systems and network drives add, in lower case. Hidden ones begin with a dot."""
_SYSTEM_FILES = {".ds_store", ".localized", "thumbs.db", "ehthumbs.db", "desktop.ini"}
"""Files that operating systems add to any folder, in lower case. Nobody needs to be told about them."""
_APPLE_DOUBLE = "._"
"""Beginning of files in which macOS keeps attributes of the file with the rest of the name."""
_MOST_NAMED = 5
"""Maximum number of names in a note."""


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a source. `path` is relative to the source's root. Videos of one `group` stay in the same fold."""

    path: str
    size: int
    label: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """Videos sorted by path. `root` is None for a built-in set.

    `notes`: what a user should know about the reading, one line each: files passed over, values that were not used.
    `version`: version of the videos of a built-in set, whose list does not show that they have changed; otherwise empty.
    """

    name: str
    root: Path | None
    videos: tuple[Video, ...]
    notes: tuple[str, ...] = ()
    version: str = ""

    @property
    def digest(self) -> str:
        """sha256 of the list (paths, sizes, labels, groups and splits) and of the version of a built-in set."""
        listed = repr([astuple(video) for video in self.videos])
        return hashlib.sha256(f"{listed}{self.version}".encode()).hexdigest()


def load_source(src: str) -> Source:
    """List the videos of a source, given as a value of `--videos`.

    - A folder: every video file in it and its subfolders, except hidden files, and files in hidden and system folders. The
      label of a file is the name of its folder. The split is the top folder, if all top folders that contain videos are
      named after splits (train, val, test and similar).
    - A list file: lines `path [label [group]]` or a CSV file whose header contains path and optionally label, group and
      split; see `read_list`. Paths are relative to the file. The group -1 is none, and in a list whose rows all end in
      `0 -1` (VideoMAE), the label 0 is none either.
    - `builtin:moving-digits`, or `builtin:moving-digits:TRAIN:TEST` with the number of clips of each split.

    Raises FileNotFoundError if there is no such folder or file, and ValueError if there are no videos, a listed video is
    missing or repeated, or the list is malformed.
    """
    if src.startswith(BUILTIN):
        return _builtin(src)
    # Path.expanduser raises RuntimeError for an unknown user.
    path = Path(os.path.expanduser(src))
    if not src or not os.path.exists(path):
        raise FileNotFoundError(f"{src}: no such folder or list file")
    return _folder(path) if path.is_dir() else _listed(path)


def hold_out(videos: Iterable[Video]) -> tuple[list[int], list[int]]:
    """Return the rows to train on and the held-out rows, for validation during training.

    Videos of the split val are held out, and other videos of a split than train are not used: they stay unseen until the final
    test. Without val, all videos of a split other than train are held out. If no video has such a split, a tenth of the groups,
    selected by hash, is held out. A video without a group is a group by itself. A single group is not held out.
    """
    videos = list(videos)
    splits = {video.split for video in videos} - {None, "train"}
    if splits:
        validation = {"val"} & splits or splits
        train = [row for row, video in enumerate(videos) if video.split in (None, "train")]
        return train, [row for row, video in enumerate(videos) if video.split in validation]
    groups = [video.group or video.path for video in videos]
    ordered = sorted(set(groups), key=lambda g: hashlib.sha256(g.encode(errors="surrogateescape")).digest())
    chosen = set(ordered[: math.ceil(len(ordered) / 10)]) if len(ordered) > 1 else set()
    rows = range(len(videos))
    return [row for row in rows if groups[row] not in chosen], [row for row in rows if groups[row] in chosen]


def spread(rows: Sequence[int], most: int) -> list[int]:
    """Return up to `most` rows, evenly spread: videos are sorted by path, so the first ones may all be of one class."""
    count = min(len(rows), most)
    return [rows[round(i * (len(rows) - 1) / max(1, count - 1))] for i in range(count)]


def _builtin(src: str) -> Source:
    name, *counts = src.removeprefix(BUILTIN).split(":")
    from data import moving_digits  # imports torch

    if name != "moving-digits" or len(counts) not in (0, 2) or not all(count.isdigit() for count in counts):
        raise ValueError(f"{src}: unknown built-in set, expected builtin:moving-digits[:TRAIN:TEST] (numbers of clips)")
    sizes = dict(zip(moving_digits.SPLITS, map(int, counts), strict=True)) if counts else moving_digits.SPLITS
    classes = moving_digits.CLASSES
    videos = [
        Video(path=f"{split}/{i:06d}", size=0, label=classes[i % len(classes)], split=split)
        for split, size in sizes.items()
        for i in range(size)
    ]
    if not videos:
        raise ValueError(f"{src}: must contain at least one clip")
    listed = tuple(sorted(videos, key=lambda v: v.path))
    return Source(name="moving-digits", root=None, videos=listed, version=moving_digits.VERSION)


def _file_size(path: str) -> int | None:
    """Return the size in bytes, or None if the path is missing, a broken link or not a regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _folder(root: Path) -> Source:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be read: {error.strerror}")

    found: list[tuple[tuple[str, ...], str, int]] = []
    hidden: list[str] = []
    endings: Counter[str] = Counter()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        hidden += [name for name in folders if _is_hidden(name)]
        folders[:] = [name for name in folders if not _is_hidden(name)]
        real_folder = os.path.realpath(folder)
        # Do not follow links to a folder that contains this one.
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [name for name in folders if not f"{real_folder}/".startswith(f"{targets[name]}/")]
        relative = os.path.relpath(folder, root)
        parents = () if relative == "." else tuple(relative.split(os.sep))
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if ending not in SUFFIXES:
                if file.lower() not in _SYSTEM_FILES and not file.startswith(_APPLE_DOUBLE):
                    endings[ending or "no ending"] += 1
                continue
            # Programs hide their own files with one dot: attributes of macOS (._a.mp4), locks, unfinished copies.
            if file.startswith(".") and not file.startswith(".."):
                hidden.append(file)
                continue
            path = os.path.join(folder, file)
            size = _file_size(path)
            if size is None:
                raise ValueError(f"{path}: is a broken link or not a regular file")
            found.append((parents, file, size))
    notes = _passed_over(hidden, endings)
    if not found:
        raise ValueError(f"{root}: contains no video files ({_SUFFIXES}){''.join(f'; {note}' for note in notes)}")
    # If videos are in a top folder that is not named after a split, `train` is a class label (the vehicle), not a split.
    tops = {parents[0].lower() for parents, _, _ in found if parents}
    has_splits = bool(tops) and tops <= _SPLITS.keys()
    if not has_splits:
        notes += _unread_splits({parents for parents, _, _ in found})
    elif count := sum(not parents for parents, _, _ in found):
        notes.append(f"{count} of {len(found)} videos are in no folder of a split: they count as training videos")
    videos = []
    for parents, file, size in found:
        split = _SPLITS[parents[0].lower()] if parents and has_splits else None
        label = parents[-1] if len(parents) >= (1 if split is None else 2) else None
        videos.append(Video("/".join((*parents, file)), size, label=label, split=split))
    videos.sort(key=lambda video: video.path)
    return Source(root.resolve().name, root.resolve(), tuple(videos), tuple(notes))


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in _SYSTEM_FOLDERS


def _passed_over(hidden: Sequence[str], endings: Counter[str]) -> list[str]:
    """Return a note about files with endings of no video, and one about hidden and system folders and files."""
    notes = []
    if total := endings.total():
        notes.append(f"{total} file{'s' * (total != 1)} passed over ({_named(endings)})")
    if hidden:
        notes.append(f"hidden or system folders and files passed over: {_named(Counter(hidden))}")
    return notes


def _unread_splits(folders: Collection[tuple[str, ...]]) -> list[str]:
    """Return a note if a top folder, or folders below, are named like splits, but are not the splits of the videos.

    Below the top, one such name is a class: folders of splits come in twos.
    """
    split_of = {
        name: match[1] for folder in folders for name in folder if (match := _LIKE_A_SPLIT.fullmatch(name.lower()))
    }
    tops = {folder[0] for folder in folders if folder}
    if len({_SPLITS[split] for split in split_of.values()}) < 2:
        split_of = {name: split for name, split in split_of.items() if name in tops}
    if not split_of:
        return []
    named = split_of.keys()
    names = _named(Counter(sorted(named)))
    known = ", ".join(_SPLITS)
    return [f"folders {names} are not read as splits: top folders are, if all that contain videos are named {known}"]


def _named(counts: Counter[str]) -> str:
    """Return the most frequent names, and an ellipsis if there are more."""
    names = [printable(name) for name, _ in counts.most_common(_MOST_NAMED)]
    return ", ".join([*names, "…"] if len(counts) > _MOST_NAMED else names)


def _listed(file: Path) -> Source:
    listing = read_list(file)
    rows = listing.rows
    if not rows:
        raise ValueError(f"{file}: lists no videos")
    list_folder = os.path.realpath(file.parent)
    paths, sizes = _look_up(file, list_folder, rows)
    # Paths are relative to the list if possible, so that they stay the same if list and videos are moved together.
    folders = {os.path.dirname(path) for path in paths}
    inside = all(f"{folder}/".startswith(f"{list_folder.rstrip('/')}/") for folder in folders)
    root = list_folder if inside else os.path.commonpath(folders)
    placeholders = all((row.label, row.group) == ("0", "-1") for row in rows)
    videos = [
        Video(
            path[len(root.rstrip("/")) + 1 :],
            size,
            label=None if placeholders else row.label or None,
            group=None if row.group == "-1" else row.group or None,
            split=_SPLITS.get(row.split.strip().lower(), row.split.strip()) or None,
        )
        for path, size, row in zip(paths, sizes, rows, strict=True)
    ]
    videos.sort(key=lambda video: video.path)
    notes = _notes_of_list(rows, listing.other_columns, placeholders)
    return Source(file.stem, Path(root), tuple(videos), tuple(notes))


def _look_up(file: Path, list_folder: str, rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    """Return the absolute paths and sizes of the listed videos.

    Raises:
        ValueError: if a video is missing or listed twice; names the line.
    """
    real_folder = functools.cache(os.path.realpath)  # folders are few, files are many
    paths, sizes = [], []
    missing: list[Row] = []
    for row in rows:
        path, size = _find(list_folder, row.path)
        if size is None:
            missing.append(row)
            continue
        if os.path.islink(path) or os.path.basename(path) in ("", ".", ".."):
            path = os.path.realpath(path)
        folder, name = os.path.split(path)
        paths.append(os.path.join(real_folder(folder), name))
        sizes.append(size)
    if missing:
        row = missing[0]
        if os.path.isdir(os.path.join(list_folder, row.path)):
            problem = f"{shown(row.path)} is a folder, expected a video file"
        else:
            problem = f"no such video: {shown(row.path)}{_advice(row.path)}"
        raise ValueError(f"{file}, line {row.line}: {problem} ({len(missing)} of {len(rows)} are missing)")
    line_of: dict[str, int] = {}
    repeated = [
        (row, path) for row, path in zip(rows, paths, strict=True) if line_of.setdefault(path, row.line) != row.line
    ]
    if repeated:
        row, path = repeated[0]
        again = f"lists {shown(row.path)} more than once, first in line {line_of[path]}"
        raise ValueError(f"{file}, line {row.line}: {again} ({len(repeated)} of {len(rows)} rows repeat a video)")
    return paths, sizes


def _find(list_folder: str, name: str) -> tuple[str, int | None]:
    """Return the path of a listed file and its size; None if it is missing.

    A name that does not exist as it is written is tried with ~ for the home folder, and with the backslashes of Windows.
    """
    for written in dict.fromkeys((name, os.path.expanduser(name), name.replace("\\", "/"))):
        path = os.path.join(list_folder, written)
        size = _file_size(path)
        if size is not None:
            return path, size
    return os.path.join(list_folder, name), None


def _advice(name: str) -> str:
    """Return what a missing name hints at, to be added to a message."""
    if any("\udc80" <= character <= "\udcff" for character in name):
        return "; the list is not UTF-8"
    if name[1:3] in (":\\", ":/"):
        return "; drives of Windows are not known here"
    if os.path.splitext(name)[1].lower() not in SUFFIXES:
        return "; a path with blanks, quotes or # needs quotes, and a CSV file needs a header with a column path"
    return ""


def _notes_of_list(rows: Sequence[Row], other_columns: Sequence[str], placeholders: bool) -> list[str]:
    notes = []
    if placeholders:
        notes.append("all rows end in 0 -1 (the form of VideoMAE): read without labels and groups")
    elif count := sum(row.group == "-1" for row in rows):
        notes.append(f"{count} of {len(rows)} listed videos have the group -1: read as no group")
    for column in ("label", "group", "split"):
        values = Counter(getattr(row, column) for row in rows)
        if values[""] and len(values) > 1:
            notes.append(f"{values['']} of {len(rows)} listed videos have no {column}")
    labels = {row.label for row in rows}
    if blurred := sorted(label for label in labels if label != label.strip() and label.strip() in labels):
        notes.append(f"the label {shown(repr(blurred[0]))} is another one than {shown(repr(blurred[0].strip()))}")
    unknown = Counter(
        row.split.strip() for row in rows if row.split.strip() and row.split.strip().lower() not in _SPLITS
    )
    if unknown:
        known = ", ".join(_SPLIT_NAMES)
        notes.append(f"splits other than {known}: {_named(unknown)}; their videos are held out, not trained on")
    if other_columns:
        notes.append(f"columns not read: {_named(Counter(other_columns))}; known are {', '.join(COLUMNS)}")
    return notes
