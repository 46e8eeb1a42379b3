"""Where videos come from: a folder, a list file, or a built-in set, always as one sorted list of `Video`."""

import csv
import functools
import hashlib
import io
import math
import os
import shlex
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

_SUFFIXES = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"
SUFFIXES = frozenset(_SUFFIXES.split())
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
BUILTIN = "builtin:"


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a source. `path` is relative to the source's root; `group` names what must stay in one fold."""

    path: str
    size: int
    label: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """Videos sorted by path; `root` is None for a built-in set."""

    name: str
    root: Path | None
    videos: tuple[Video, ...]

    @property
    def digest(self) -> str:
        """Hash of the list: paths, sizes, labels, groups and splits."""
        return hashlib.sha256(repr([astuple(video) for video in self.videos]).encode()).hexdigest()


def load_source(src: str) -> Source:
    """Open what `--videos` names.

    - a folder: every video file below it; the folder around a file is its label,
      a top folder train, val or test its split;
    - a list file: lines `path [label [group]]` (shell quoting, # comments), or CSV with a header of path and any of
      label, group, split; paths are relative to the file;
    - `builtin:moving-digits`, or with the numbers of clips per split `builtin:moving-digits:TRAIN:TEST`.

    Raises:
        ValueError: if it holds no videos, lists a missing or repeated one, or cannot be understood.
        FileNotFoundError: if there is no such folder or file.
    """
    if src.startswith(BUILTIN):
        return _builtin(src)
    path = Path(src).expanduser()
    if not src or not path.exists():
        raise FileNotFoundError(f"{src}: no such folder or list file")
    source = _folder(path) if path.is_dir() else _list_file(path)
    twice = [p for p, n in Counter(v.path for v in source.videos).items() if n > 1]
    if twice:
        raise ValueError(f"{src}: lists {twice[0]} more than once")
    return source


def hold_out(videos: Iterable[Video]) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on.

    Videos of a split other than train are held out. Where no video has a split, every tenth group is, chosen by hash;
    a video without a group is its own.
    """
    videos = list(videos)
    if any(v.split not in (None, "train") for v in videos):
        held = [v.split not in (None, "train") for v in videos]
    else:
        groups = sorted(
            {v.group or v.path for v in videos},
            key=lambda g: hashlib.sha256(g.encode(errors="surrogateescape")).digest(),
        )
        chosen = set(groups[: math.ceil(len(groups) / 10)]) if len(groups) > 1 else set()
        held = [(v.group or v.path) in chosen for v in videos]
    return [i for i, h in enumerate(held) if not h], [i for i, h in enumerate(held) if h]


def _builtin(src: str) -> Source:
    name, *counts = src.removeprefix(BUILTIN).split(":")
    from data import moving_digits  # imports torch

    sizes = dict(moving_digits.SPLITS)
    if name != "moving-digits" or len(counts) not in (0, 2) or not all(c.isdigit() for c in counts):
        raise ValueError(f"{src}: the built-in set is builtin:moving-digits or builtin:moving-digits:TRAIN:TEST")
    if counts:
        sizes = dict(zip(sizes, map(int, counts), strict=True))
    classes = moving_digits.CLASSES
    videos = [
        Video(path=f"{split}/{i:06d}", size=0, label=classes[i % len(classes)], split=split)
        for split, n in sizes.items()
        for i in range(n)
    ]
    if not videos:
        raise ValueError(f"{src}: asks for no clips")
    return Source(name="moving-digits", root=None, videos=tuple(sorted(videos, key=lambda v: v.path)))


def _folder(root: Path) -> Source:
    videos = []
    tops = [entry.name.lower() for entry in os.scandir(root) if entry.is_dir()]
    has_splits = bool(tops) and all(
        top in _SPLITS for top in tops
    )  # beside other folders, `train` is a class of trains
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        here = os.path.realpath(folder)
        # Not into links that lead back to where the walk came from.
        folders[:] = [f for f in folders if not f"{here}/".startswith(os.path.realpath(os.path.join(folder, f)) + "/")]
        inner = os.path.relpath(folder, root)
        parents = () if inner == "." else tuple(inner.split(os.sep))
        split = _SPLITS[parents[0].lower()] if parents and has_splits else None
        label = parents[-1] if len(parents) > (split is not None) else None
        for file in files:
            if os.path.splitext(file)[1].lower() not in SUFFIXES:
                continue
            full = os.path.join(folder, file)
            try:
                status = os.stat(full)
            except OSError:
                status = None
            if status is None or not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{full}: is a broken link or no file")
            videos.append(Video("/".join((*parents, file)), status.st_size, label=label, split=split))
    if not videos:
        raise ValueError(f"{root}: holds no video files ({_SUFFIXES})")
    return Source(name=root.resolve().name, root=root.resolve(), videos=tuple(sorted(videos, key=lambda v: v.path)))


def _raise(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read: {error.strerror}")


def _list_file(file: Path) -> Source:
    try:
        text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{file}: is neither a folder nor a text list of videos")
    rows = _csv_rows(file, text) if _is_csv(file, text) else _plain_rows(file, text)
    if not rows:
        raise ValueError(f"{file}: lists no videos")
    here = os.path.realpath(file.parent)
    folder_of = functools.cache(os.path.realpath)  # folders are few, files are many
    full: list[tuple[str, int, dict[str, str]]] = []
    missing = []
    for line, row in rows:
        path = os.path.join(here, row["path"])
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            missing.append((line, row["path"]))
            continue
        if os.path.islink(path) or os.path.basename(path) in ("", ".", ".."):
            path = os.path.realpath(path)
        full.append((os.path.join(folder_of(os.path.dirname(path)), os.path.basename(path)), status.st_size, row))
    if missing:
        line, name = missing[0]
        raise ValueError(f"{file}, line {line}: no such video: {name} ({len(missing)} of {len(rows)} are missing)")
    # Relative to the list where possible, so that moving list and videos together changes nothing.
    folders = {os.path.dirname(path) for path, _, _ in full}
    inside = all(f"{folder}/".startswith(f"{here.rstrip('/')}/") for folder in folders)
    root = here if inside else os.path.commonpath(folders)
    videos = [
        Video(
            path[len(root.rstrip("/")) + 1 :],
            size,
            label=row.get("label") or None,
            group=row.get("group") or None,
            split=_SPLITS.get(row.get("split", "").lower(), row.get("split")) or None,
        )
        for path, size, row in full
    ]
    return Source(name=file.stem, root=Path(root), videos=tuple(sorted(videos, key=lambda v: v.path)))


def _is_csv(file: Path, text: str) -> bool:
    header = text.lstrip().split("\n", 1)[0].strip().lower().split(",")
    return file.suffix.lower() == ".csv" or "path" in header


def _csv_rows(file: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if "path" not in reader.fieldnames:
        raise ValueError(
            f"{file}: a CSV list needs a header line with a column 'path' (and label, group, split if there are any)"
        )
    try:
        return [(reader.line_num, {k: v for k, v in row.items() if k and v}) for row in reader if row["path"]]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from None


def _plain_rows(file: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    rows = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        try:
            fields = shlex.split(_without_comment(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        if len(fields) > 3:
            raise ValueError(
                f"{file}, line {number}: {len(fields)} fields, expected 'path [label [group]]'; "
                "quote a path with spaces"
            )
        if fields:
            rows.append((number, dict(zip(("path", "label", "group"), fields, strict=False))))
    return rows


def _without_comment(line: str) -> str:
    """The line up to a # that begins a word outside quotes; shlex would also cut `lab#1`."""
    quote = ""
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line
