"""Sources of videos: a folder, a list file or a built-in set, read into one sorted list of `Video`."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from data.list_files import COLUMNS, Row, read_list, shown
from data.list_lookup import look_up, segment_of
from data.recorded import GROUPS, without_option
from data.text import appearance, escaped, told_apart
from data.video_files import ABSENT, ENDINGS, FolderContent, FoundFile, find_videos, named, names_of_files

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLITS = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
_LIKE_A_SPLIT = re.compile(rf"({'|'.join(_SPLITS)})([^a-z].*)?", re.DOTALL)
"""Names such as val_256, in lower case."""
BUILTIN = "builtin:"


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
    `missing`: listed videos that do not exist, with their paths as they are written, if they are allowed.
    """

    name: str
    root: Path | None
    videos: tuple[Video, ...]
    notes: tuple[str, ...] = ()
    version: str = ""
    missing: tuple[Video, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of the list (paths, sizes, labels, groups and splits) and of the version of a built-in set."""
        listed = repr([astuple(video) for video in self.videos])
        return hashlib.sha256(f"{listed}{self.version}".encode()).hexdigest()


def load_source(src: str, *, allow_missing: bool = False) -> Source:
    """List the videos of a source, given as a value of `--videos`.

    - A folder: every video file in it and its subfolders, except hidden files, and files in hidden and system folders. The
      label of a file is the first folder below the root. The split is the top folder, if all top folders that contain videos
      are named after splits (train, val, test and similar); the label is then the folder below it. With `?group=folder` after
      the name of the root, the folder below the label is the group.
    - A list file: lines `path [label [group]]` or a CSV file whose header contains path and optionally label, group, split,
      and start and end in seconds, so that parts of a video are rows of their own; see `read_list`. Paths are relative to the
      file. The group -1 is none, and in a list whose rows all end in `0 -1` (VideoMAE), the label 0 is none either.
    - `builtin:moving-digits`, or `builtin:moving-digits:TRAIN:TEST` with the number of clips of each split.

    `allow_missing`: leave out listed videos that are missing.

    Raises FileNotFoundError if there is no such folder or file, and ValueError if there are no videos, a listed video is
    missing or repeated, or the list is malformed.
    """
    if src.startswith(BUILTIN):
        return _builtin(src)
    src, groups = without_option(src)
    # Path.expanduser raises RuntimeError for an unknown user.
    path = Path(os.path.expanduser(src))
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode) if src else None
    except ValueError:
        is_folder = None
    except OSError as error:
        if error.errno not in ABSENT:
            raise ValueError(f"{escaped(src)}: cannot be read: {error.strerror}") from None
        is_folder = None
    if is_folder is None:
        raise FileNotFoundError(f"{escaped(src)}: no such folder or list file")
    if is_folder:
        return _folder(path, bool(groups))
    if groups:
        raise ValueError(f"{escaped(src)}: {groups} needs a folder; a list has a column group")
    return _listed(path, allow_missing)


def hold_out(videos: Iterable[Video]) -> tuple[list[int], list[int]]:
    """Return the rows to train on and the held-out rows, for validation during training.

    Videos of the split val are held out, and other videos of a split than train are not used: they stay unseen until the final
    test. Without val, all videos of a split other than train are held out. If no video has such a split, whole groups with about
    a tenth of the videos are held out (`_held_groups`). A video without a group is a group by itself.
    """
    videos = list(videos)
    splits = {video.split for video in videos} - {None, "train"}
    if splits:
        validation = {"val"} & splits or splits
        train = [row for row, video in enumerate(videos) if video.split in (None, "train")]
        return train, [row for row, video in enumerate(videos) if video.split in validation]
    groups = [video.group or video.path for video in videos]
    chosen = _held_groups(Counter(groups))
    rows = range(len(videos))
    return [row for row in rows if groups[row] not in chosen], [row for row in rows if groups[row] in chosen]


def training_rows(videos: Sequence[Video], name: str) -> tuple[list[int], list[int]]:
    """Return what `hold_out` returns for the videos of the source or cache `name`.

    Raises:
        ValueError: if there are no videos to train on.
    """
    train, held_out = hold_out(videos)
    if not train:
        counts = Counter(video.split for video in videos)
        splits = ", ".join(f"{count} in {escaped(str(split))}" for split, count in counts.most_common())
        raise ValueError(
            f"{escaped(name)}: no training videos: all {len(videos)} videos are in other splits than train ({splits})"
        )
    return train, held_out


def _held_groups(sizes: Counter[str]) -> set[str]:
    """Return the groups that are held out, given the number of videos of each group.

    Groups are held out in the order of their hashes until they have a tenth of the videos. A group with which they would have
    more than a fifth is passed over. If all are, the smallest group is held out. A single group is not held out.
    """
    if len(sizes) < 2:
        return set()
    order = sorted(sizes, key=lambda group: hashlib.sha256(group.encode(errors="surrogateescape")).digest())
    total, held = sizes.total(), 0
    chosen = set()
    for group in order:
        if 10 * held >= total:
            break
        if 5 * (held + sizes[group]) <= total:
            chosen.add(group)
            held += sizes[group]
    return chosen or {min(order, key=sizes.__getitem__)}


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


def _folder(root: Path, with_groups: bool) -> Source:
    content = find_videos(root)
    notes = content.notes()
    if not content.files:
        raise ValueError(f"{root}: contains no video files ({ENDINGS}){''.join(f'; {note}' for note in notes)}")
    files = names_of_files(root, content.files)
    found = [names[0] for names in files]
    # If videos are in a top folder that is not named after a split, `train` is a class label (the vehicle), not a split.
    tops = {file.parents[0].lower() for file in found if file.parents}
    has_splits = bool(tops) and tops <= _SPLITS.keys()
    _check_links(root, content, files, has_splits)
    if passed_over := sorted(name.path for names in files for name in names[1:]):
        plural = "s" * (len(passed_over) != 1)
        notes.append(
            f"{len(passed_over)} other name{plural} of the same files (links) passed over: {named(passed_over)}"
        )
    if not has_splits:
        notes += _unread_splits({file.parents for file in content.files})
    elif count := sum(not file.parents for file in found):
        notes.append(f"{count} of {len(found)} videos are in no folder of a split: they count as training videos")
    videos, deeper = [], 0
    for file in found:
        label, split = _label_and_split(file.parents, has_splits)
        below = file.parents[1 if split is None else 2 :]
        deeper += bool(below)
        group = below[0] if below and with_groups else None
        videos.append(Video(file.path, file.size, label=label, group=group, split=split))
    if deeper and not with_groups:
        notes.append(
            f"{deeper} of {len(found)} videos are in folders below the folder of their label, which are not read; "
            f"{GROUPS} after the name of the folder makes them groups"
        )
    videos.sort(key=lambda video: video.path)
    notes += _look_alikes("label", (video.label for video in videos))
    return Source(root.resolve().name, root.resolve(), tuple(videos), tuple(notes))


def _label_and_split(parents: tuple[str, ...], has_splits: bool) -> tuple[str | None, str | None]:
    """Return the label and the split of the videos in a folder, given by its path below the root."""
    split = _SPLITS.get(parents[0].lower()) if parents and has_splits else None
    label = parents[0 if split is None else 1 :][:1]
    return label[0] if label else None, split


def _check_links(root: Path, content: FolderContent, files: list[list[FoundFile]], has_splits: bool) -> None:
    """Refuse a folder in which links give one video several labels or splits.

    A folder that is reached through fewer links under another name has the label of that name.

    Raises:
        ValueError: with the first such pair of names.
    """
    folders = {file.parents for file in content.files}
    with_videos = {parents[:depth] for parents in folders for depth in range(len(parents) + 1)}
    # Both names, the folders that give each its label and split, and whether both labels count.
    pairs = [
        (first.path, first.parents, other.path, other.parents, True) for first, *others in files for other in others
    ] + [
        ("/".join(link.read_as), link.read_as, "/".join(link.parents), link.parents, not link.is_alias)
        for link in content.linked_folders
        if link.read_as in with_videos
    ]
    problems = []
    for first, first_folders, other, other_folders, labels_count in pairs:
        label, split = _label_and_split(first_folders, has_splits)
        other_label, other_split = _label_and_split(other_folders, has_splits)
        if split and other_split and split != other_split:
            problems.append((first, other, "splits", f"{split} and {other_split}"))
        elif labels_count and first_folders in folders and label != other_label:
            problems.append((first, other, "labels", " and ".join(told_apart(str(label), str(other_label)))))
    if problems:
        first, other, kind, values = problems[0]
        first, other = told_apart(first, other)
        raise ValueError(
            f"{root}: {first} and {other} are one file or folder (links) with two {kind}: {values}; "
            f"keep one name, or give a list file ({len(problems)} of {len(pairs)} such pairs differ)"
        )


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
    known = ", ".join(_SPLITS)
    return [
        f"folders {named(sorted(split_of))} are not read as splits: top folders are, if all that contain videos are named {known}"
    ]


def _look_alikes(kind: str, values: Iterable[str | None]) -> list[str]:
    """Return a note if two labels or groups look the same, but differ in Unicode form or in characters that show nothing."""
    alike: dict[str, str] = {}
    for value in sorted({value for value in values if value}):
        first = alike.setdefault(appearance(value), value)
        if first != value:
            one, other = told_apart(first, value)
            return [f"the {kind}s '{one}' and '{other}' are different {kind}s"]
    return []


def _listed(file: Path, allow_missing: bool) -> Source:
    listing = read_list(file)
    rows = listing.rows
    if not rows:
        raise ValueError(f"{file}: lists no videos")
    list_folder = os.path.realpath(file.parent)
    found = look_up(file, list_folder, rows, allow_missing=allow_missing)
    if not found.rows:
        raise ValueError(f"{file}: all {len(rows)} listed videos are missing, such as {shown(rows[0].path)}")
    rows, paths, sizes = found.rows, found.paths, found.sizes
    # Paths are relative to the list if possible, so that they stay the same if list and videos are moved together.
    folders = {os.path.dirname(path) for path in paths}
    inside = all(f"{folder}/".startswith(f"{list_folder.rstrip('/')}/") for folder in folders)
    root = list_folder if inside else os.path.commonpath(folders)
    placeholders = all((row.label, row.group) == ("0", "-1") for row in rows)

    def video_of(row: Row, name: str, size: int) -> Video:
        segment = segment_of(file, row)
        return Video(
            name if segment is None else segment.path(name),
            size,
            label=None if placeholders else row.label or None,
            # Parts of a video are alike.
            group=(None if row.group == "-1" else row.group or None) or (name if segment is not None else None),
            split=_SPLITS.get(row.split.strip().lower(), row.split.strip()) or None,
        )

    names = [path[len(root.rstrip("/")) + 1 :] for path in paths]
    videos = [video_of(*one) for one in zip(rows, names, sizes, strict=True)]
    parts = sum(segment_of(file, row) is not None for row in rows)
    videos.sort(key=lambda video: video.path)
    notes = _notes_of_list(rows, listing.other_columns, placeholders)
    if parts:
        notes.append(
            f"{parts} of {len(rows)} rows are parts of videos, from start to end; without a group, the video is the group"
        )
    missing = tuple(video_of(row, row.path, 0) for row in found.missing)
    return Source(file.stem, Path(root), tuple(videos), tuple(notes), missing=missing)


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
    for column in ("label", "group"):
        notes += _look_alikes(column, (getattr(row, column) for row in rows))
    unknown = Counter(
        row.split.strip() for row in rows if row.split.strip() and row.split.strip().lower() not in _SPLITS
    )
    if unknown:
        known = ", ".join(_SPLIT_NAMES)
        notes.append(f"splits other than {known}: {named(unknown)}; their videos are held out, not trained on")
    if other_columns:
        notes.append(f"columns not read: {named(other_columns)}; known are {', '.join(COLUMNS)}")
    return notes
