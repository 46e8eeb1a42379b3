"""Files that several processes share: written at once or not at all, claimed by one writer at a time."""

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SIGN_OF_LIFE = 15.0
"""Seconds between two signs of life of whoever holds a claim."""
ABANDONED_AFTER = 180.0
"""Seconds without one after which work of another machine may be done anew."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once or not at all, one line for each key."""
    lines = [f"{json.dumps(key)}: {compact(content[key])}" for key in sorted(content)]
    write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def compact(content: Any) -> str:
    """JSON without spaces, keys sorted: the form that is hashed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of(content: Any) -> str:
    """Hash of JSON content, whatever the order of its keys."""
    return hashlib.sha256(compact(content).encode()).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file at once or not at all; it is on the disk when this returns."""
    with _whole(path, content) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_first(path: Path, content: bytes) -> None:
    """Write a file unless there is one already; of several writers the first wins."""
    with _whole(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def _whole(path: Path, content: bytes) -> Iterator[Path]:
    """The content under a temporary name, which is gone afterwards."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f"{path.name}.tmp-{machine()}-{os.getpid()}")


def remove_left_overs(folder: Path) -> None:
    """Delete what killed processes of this machine were writing or had claimed, and what is a day old."""
    for path in folder.glob("*.tmp-*-*"):
        owner, _, process = path.name.partition(".tmp-")[2].rpartition("-")
        dead = owner == machine() and process.isdigit() and _start_of(int(process)) is None
        if dead or owner != machine() and _age(path) > 86_400:
            path.unlink(missing_ok=True)
    for path in folder.glob("*.claim"):
        if _abandoned(path):
            path.unlink(missing_ok=True)


class Claim:
    """Says to the other processes of this and other machines: this piece of work is mine.

    A symbolic link whose target names the owner: made in one step, by one process only, on network folders too. It
    only saves double work. Where links do not exist, or two processes take over an abandoned claim at once, both write
    the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self) -> bool:
        """Whether the work is ours now; that of a dead process, or of a machine long silent, is taken over."""
        try:
            if self._path.is_symlink() and _abandoned(self._path):
                self._path.unlink(missing_ok=True)
            os.symlink(_owner(), self._path)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def keep(self) -> None:
        """A sign of life."""
        with suppress(OSError, NotImplementedError):
            os.utime(self._path, follow_symlinks=False)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)


def _owner() -> str:
    return f"{machine()}:{os.getpid()}:{_start_of(os.getpid())}"


@functools.cache
def machine() -> str:
    """Name of this machine, or of the container, which has process numbers of its own."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return f"{parts[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _start_of(process: int) -> str | None:
    """When a process of this machine began, for another may get its number; None if it is dead."""
    try:
        found = psutil.Process(process)
        if found.status() == psutil.STATUS_ZOMBIE:
            return None
        with suppress(OSError):  # in ticks since the machine started: psutil's seconds follow the clock when it is set
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{found.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def _abandoned(claim: Path) -> bool:
    try:
        owner, process, started = os.readlink(claim).rsplit(":", 2)
        if owner != machine():
            return _age(claim) > ABANDONED_AFTER
        return _start_of(int(process)) != started
    except (OSError, ValueError):  # gone meanwhile, or no claim of ours
        return _age(claim) > ABANDONED_AFTER


def _age(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
