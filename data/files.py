"""Files shared by several processes: atomic writes, and locks (claims) on pieces of work."""

import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SIGN_OF_LIFE = 15.0
"""Seconds between two updates of a claim's timestamp by its owner."""
ABANDONED_AFTER = 180.0
"""Seconds without an update after which the claim of another machine is stale."""
_DAY = 86_400.0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, one line for each key."""
    lines = [f"{json.dumps(key)}: {compact(content[key])}" for key in sorted(content)]
    write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def compact(content: Any) -> str:
    """Return JSON without spaces and with sorted keys: the form that is hashed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of(content: Any) -> str:
    """Return the sha256 of JSON content in hex. The order of keys does not matter."""
    return hashlib.sha256(compact(content).encode()).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and flush it to the disk."""
    with _temporary_file(path, content) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_first(path: Path, content: bytes) -> None:
    """Write a file atomically unless it exists already. The first of several writers wins."""
    with _temporary_file(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:
            # The file system has no hard links.
            if not path.exists():
                os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def _temporary_file(path: Path, content: bytes) -> Iterator[Path]:
    """Write the content to a temporary file next to `path` and delete that file afterwards if it still exists."""
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
    """Make renames in a folder survive a power failure, if the system supports it."""
    with suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporary_name(path: Path) -> Path:
    """Return the path at which this process writes a file before renaming it to `path`."""
    return path.with_name(f"{path.name}.tmp-{machine()}-{os.getpid()}")


def remove_left_overs(folder: Path) -> None:
    """Delete stale claims, and temporary files of dead processes of this machine or, if a day old, of other machines.

    The clock of this machine is not used (see `_age`), because it may be wrong.
    """
    for path in folder.glob("*.tmp-*-*"):
        owner, _, process = path.name.partition(".tmp-")[2].rpartition("-")
        own = owner == machine()
        dead = own and process.isdigit() and _start_of(int(process)) is None
        if dead or (not own and _age(path) > _DAY):
            path.unlink(missing_ok=True)
    for path in folder.glob("*.claim"):
        if _is_stale(path):
            path.unlink(missing_ok=True)


class Claim:
    """Lock on a piece of work among processes of this and other machines.

    The lock is a symbolic link whose target names the owner. Only one process can create it, on network file systems too.
    A claim only avoids duplicate work. If the file system has no links, or two processes take over a stale claim at the
    same time, both do the work and write the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self) -> bool:
        """Try to claim the work and return whether this process may do it. A stale claim is taken over."""
        try:
            if self._path.is_symlink() and _is_stale(self._path):
                self._path.unlink(missing_ok=True)
            os.symlink(f"{machine()}:{os.getpid()}:{_start_of(os.getpid())}", self._path)
        except FileExistsError:
            return False
        except OSError:
            pass  # this file system has no symbolic links
        return True

    def keep(self) -> None:
        """Update the timestamp, which shows other machines that the owner is alive."""
        with suppress(OSError, NotImplementedError):
            os.utime(self._path, follow_symlinks=False)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)


@functools.cache
def machine() -> str:
    """Return a name of this machine, or of this container, because each container numbers its own processes."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return f"{parts[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _start_of(process: int) -> str | None:
    """Return the start time of a process of this machine, None if it is dead. A later process may reuse the number."""
    try:
        entry = psutil.Process(process)
        if entry.status() == psutil.STATUS_ZOMBIE:
            return None
        # Linux counts ticks since the machine started. psutil's start time changes when the clock is set.
        with suppress(OSError):
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{entry.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def _is_stale(claim: Path) -> bool:
    with suppress(OSError, ValueError):  # released meanwhile, or in another format
        owner, process, started = os.readlink(claim).rsplit(":", 2)
        if owner == machine():
            return _start_of(int(process)) != started
    return _age(claim) > ABANDONED_AFTER


def _age(path: Path) -> float:
    """Return the seconds since the last update of a file, by the clock that stamps files, which a file server may have.

    Return 0 if the file does not exist, or its folder cannot be written.
    """
    try:
        # A new file has the present time of that clock.
        with tempfile.TemporaryFile(dir=path.parent) as new:
            return os.fstat(new.fileno()).st_mtime - path.lstat().st_mtime
    except OSError:
        return 0.0
