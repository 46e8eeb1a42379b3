"""Video files of a folder and its subfolders. Links are followed, but each folder is read once, under one name."""

import errno
import heapq
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.text import escaped

ENDINGS = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"
SUFFIXES = frozenset(ENDINGS.split())
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
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors of the system for a path at which there is nothing."""
_MOST_NAMED = 5
"""Maximum number of names in a note."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One name of a video file. `parents` are its folders below the root.

    `node` (device and inode) is the same for all names of one file. Some network drives also give it to different files.
    """

    parents: tuple[str, ...]
    name: str
    size: int
    node: tuple[int, int]
    is_link: bool
    has_hard_links: bool

    @property
    def path(self) -> str:
        """Path relative to the root."""
        return "/".join((*self.parents, self.name))


@dataclass(frozen=True, slots=True)
class LinkedFolder:
    """Another name `parents` of a folder that is read as `read_as`; `is_alias` if it is reached there through fewer links."""

    parents: tuple[str, ...]
    read_as: tuple[str, ...]
    is_alias: bool


@dataclass(frozen=True)
class FolderContent:
    """Video files below a folder, in no particular order; links that were not followed; names that were passed over."""

    files: list[FoundFile] = field(default_factory=list)
    linked_folders: list[LinkedFolder] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    """Links to a folder that contains them."""
    broken_links: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """Return a note about each kind of file, folder and link that was passed over."""
        notes = []
        if total := self.endings.total():
            notes.append(f"{total} file{'s' * (total != 1)} passed over ({named(self.endings)})")
        if self.hidden:
            notes.append(f"hidden or system folders and files passed over: {named(self.hidden)}")
        if self.broken_links:
            notes.append(f"links that lead nowhere passed over: {named(self.broken_links)}")
        if links := [*("/".join(link.parents) for link in self.linked_folders), *self.loops]:
            count = f"{len(links)} link{'s' * (len(links) != 1)}"
            kind = "to folders that are read under another name or contain the link"
            notes.append(f"{count} {kind} passed over: {named(sorted(links))}")
        return notes


def find_videos(root: Path) -> FolderContent:
    """Find the video files of a folder and its subfolders.

    Hidden and system folders and files are passed over. A folder with several names is read under the one that is reached
    through the fewest links, and of these the first in alphabetical order. A link to a folder that contains it is not followed.

    Raises:
        ValueError: if a folder or file cannot be read, or a name of a video is a broken link or no regular file.
    """
    content = FolderContent()
    # Number of links, names below the root, real path. Folders with the fewest links come first.
    pending: list[tuple[int, tuple[str, ...], str]] = [(0, (), os.path.realpath(root))]
    read: dict[str, tuple[int, tuple[str, ...]]] = {}
    while pending:
        links, parents, real = heapq.heappop(pending)
        if real in read:
            fewest, read_as = read[real]
            content.linked_folders.append(LinkedFolder(parents, read_as, is_alias=fewest < links))
            continue
        read[real] = links, parents
        folder = os.path.join(root, *parents)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        subfolder = _subfolder(entry, links, parents, real, content)
                        if subfolder is not None:
                            heapq.heappush(pending, subfolder)
                    elif (found := _video_file(entry, parents, content)) is not None:
                        content.files.append(found)
        except OSError as error:
            raise ValueError(f"{escaped(error.filename or folder)}: cannot be read: {error.strerror}") from None
    return content


def status_of(path: str) -> os.stat_result | None:
    """Return the status of a regular file, or None if there is none.

    Raises:
        OSError: if the system cannot tell, for example without permission or after an I/O error.
    """
    try:
        status = os.stat(path)
    except ValueError:
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) else None


def names_of_files(root: Path, names: Iterable[FoundFile]) -> list[list[FoundFile]]:
    """Return the names of each file: first one that is no symbolic link, if any, and then in alphabetical order."""
    names_of_node: defaultdict[tuple[int, int], list[FoundFile]] = defaultdict(list)
    for name in names:
        names_of_node[name.node].append(name)
    files: list[list[FoundFile]] = []
    for node, alike in names_of_node.items():
        if len(alike) == 1:
            files.append(alike)
            continue
        names_of: defaultdict[object, list[FoundFile]] = defaultdict(list)
        for name in sorted(alike, key=lambda name: (name.is_link, name.path)):
            names_of[node if name.has_hard_links else os.path.realpath(root / name.path)].append(name)
        files += names_of.values()
    return files


def named(names: Iterable[str]) -> str:
    """Return the most frequent names, and an ellipsis if there are more."""
    counts = Counter(names)
    shown = [escaped(name) for name, _ in counts.most_common(_MOST_NAMED)]
    return ", ".join([*shown, "…"] if len(counts) > _MOST_NAMED else shown)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise


def _subfolder(
    entry: os.DirEntry[str], links: int, parents: tuple[str, ...], real: str, content: FolderContent
) -> tuple[int, tuple[str, ...], str] | None:
    """Return what `find_videos` keeps of a subfolder that is to be read."""
    if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FOLDERS:
        content.hidden.append(entry.name)
        return None
    below = (*parents, entry.name)
    if not entry.is_symlink():
        return links, below, os.path.join(real, entry.name)
    target = os.path.realpath(entry.path)
    if f"{real}/".startswith(f"{target.rstrip('/')}/"):
        content.loops.append("/".join(below))
        return None
    return links + 1, below, target


def _video_file(entry: os.DirEntry[str], parents: tuple[str, ...], content: FolderContent) -> FoundFile | None:
    """Return a video file, or note in `content` why it is passed over."""
    name = entry.name
    ending = os.path.splitext(name)[1].lower()
    is_link = entry.is_symlink()
    if ending not in SUFFIXES:
        # Editors lock a file with a hidden link that leads nowhere.
        if is_link and not name.startswith(".") and not os.path.exists(entry.path):
            content.broken_links.append("/".join((*parents, name)))
        elif name.lower() not in _SYSTEM_FILES and not name.startswith(_APPLE_DOUBLE):
            content.endings[ending or "no ending"] += 1
        return None
    # Programs hide their own files with one dot: attributes of macOS (._a.mp4), locks, unfinished copies.
    if name.startswith(".") and not name.startswith(".."):
        content.hidden.append(name)
        return None
    status = status_of(entry.path)
    if status is None:
        raise ValueError(f"{escaped(entry.path)}: is a broken link or not a regular file")
    node = (status.st_dev, status.st_ino)
    return FoundFile(parents, name, status.st_size, node, is_link, has_hard_links=status.st_nlink > 1)
