"""Sources of videos: a folder, a list file or a built-in set, read into one sorted list of `Video`."""

import csv
import functools
import hashlib
import io
import math
import os
import re
import shlex
import stat
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

_SUFFIXES = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"
SUFFIXES = frozenset(_SUFFIXES.split())
_SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_SPLITS = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
BUILTIN = "builtin:"
# Text before a comment, then the comment. It starts with # at the start of an unquoted word. shlex would also cut `lab#1`.
_COMMENT = re.compile(r"""((?:[^'"#]+|'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|(?<=\S)#)*).*""", re.DOTALL)


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
    """Videos sorted by path. `root` is None for a built-in set."""

    name: str
    root: Path | None
    videos: tuple[Video, ...]

    @property
    def digest(self) -> str:
        """sha256 of the list: paths, sizes, labels, groups and splits."""
        return hashlib.sha256(repr([astuple(video) for video in self.videos]).encode()).hexdigest()


def load_source(src: str) -> Source:
    """List the videos of a source, given as a value of `--videos`.

    - A folder: every video file in it and its subfolders. The label of a file is the name of its folder. The split is
      the top folder, if all top folders are named after splits (train, val, test and similar).
    - A list file: lines `path [label [group]]` (shell quoting, # comments), or a CSV file whose header contains
      path and optionally label, group and split. Paths are relative to the file.
    - `builtin:moving-digits`, or `builtin:moving-digits:TRAIN:TEST` with the number of clips of each split.

    Raises FileNotFoundError if there is no such folder or file, and ValueError if there are no videos, a listed video is
    missing or repeated, or the list is malformed.
    """
    if src.startswith(BUILTIN):
        return _builtin(src)
    path = Path(src).expanduser()
    if not src or not path.exists():
        raise FileNotFoundError(f"{src}: no such folder or list file")
    source = _folder(path) if path.is_dir() else _list_file(path)
    for video, following in zip(source.videos, source.videos[1:], strict=False):
        if video.path == following.path:
            raise ValueError(f"{src}: lists {video.path} more than once")
    return source


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
    return Source(name="moving-digits", root=None, videos=tuple(sorted(videos, key=lambda v: v.path)))


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

    videos = []
    tops = [entry.name.lower() for entry in os.scandir(root) if entry.is_dir()]
    # If some top folder is not named after a split, `train` is a class label (the vehicle), not a split.
    has_splits = bool(tops) and all(top in _SPLITS for top in tops)
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real_folder = os.path.realpath(folder)
        # Do not follow links to a folder that contains this one.
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [name for name in folders if not f"{real_folder}/".startswith(f"{targets[name]}/")]
        relative = os.path.relpath(folder, root)
        parents = () if relative == "." else tuple(relative.split(os.sep))
        split = _SPLITS[parents[0].lower()] if parents and has_splits else None
        label_depth = 1 if split is None else 2
        label = parents[-1] if len(parents) >= label_depth else None
        for file in files:
            if os.path.splitext(file)[1].lower() not in SUFFIXES:
                continue
            path = os.path.join(folder, file)
            size = _file_size(path)
            if size is None:
                raise ValueError(f"{path}: is a broken link or not a regular file")
            videos.append(Video("/".join((*parents, file)), size, label=label, split=split))
    if not videos:
        raise ValueError(f"{root}: contains no video files ({_SUFFIXES})")
    return Source(name=root.resolve().name, root=root.resolve(), videos=tuple(sorted(videos, key=lambda v: v.path)))


def _list_file(file: Path) -> Source:
    try:
        text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{file}: is neither a folder nor a text list of videos")
    first_line = text.lstrip().split("\n", 1)[0]
    is_csv = file.suffix.lower() == ".csv" or "path" in first_line.strip().lower().split(",")
    rows = _csv_rows(file, text) if is_csv else _plain_rows(file, text)
    if not rows:
        raise ValueError(f"{file}: lists no videos")
    list_folder = os.path.realpath(file.parent)
    real_folder = functools.cache(os.path.realpath)  # folders are few, files are many
    entries: list[tuple[str, int, dict[str, str]]] = []
    missing = []
    for line, row in rows:
        path = os.path.join(list_folder, row["path"])
        size = _file_size(path)
        if size is None:
            missing.append((line, row["path"]))
            continue
        if os.path.islink(path) or os.path.basename(path) in ("", ".", ".."):
            path = os.path.realpath(path)
        folder, name = os.path.split(path)
        entries.append((os.path.join(real_folder(folder), name), size, row))
    if missing:
        line, name = missing[0]
        raise ValueError(f"{file}, line {line}: no such video: {name} ({len(missing)} of {len(rows)} are missing)")
    # Paths are relative to the list if possible, so that they stay the same if list and videos are moved together.
    folders = {os.path.dirname(path) for path, _, _ in entries}
    inside = all(f"{folder}/".startswith(f"{list_folder.rstrip('/')}/") for folder in folders)
    root = list_folder if inside else os.path.commonpath(folders)
    videos = [
        Video(
            path[len(root.rstrip("/")) + 1 :],
            size,
            label=row.get("label") or None,
            group=row.get("group") or None,
            split=_SPLITS.get(row.get("split", "").lower(), row.get("split")) or None,
        )
        for path, size, row in entries
    ]
    return Source(name=file.stem, root=Path(root), videos=tuple(sorted(videos, key=lambda v: v.path)))


def _csv_rows(file: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if "path" not in reader.fieldnames:
        raise ValueError(f"{file}: its header must have a column 'path', and may have label, group and split")
    try:
        return [(reader.line_num, {k: v for k, v in row.items() if k and v}) for row in reader if row["path"]]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from None


def _plain_rows(file: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    rows = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        try:
            fields = shlex.split(_COMMENT.sub(r"\1", line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        if len(fields) > 3:
            expected = "expected 'path [label [group]]'; quote a path with spaces"
            raise ValueError(f"{file}, line {number}: {len(fields)} fields, {expected}")
        if fields:
            rows.append((number, dict(zip(("path", "label", "group"), fields, strict=False))))
    return rows
