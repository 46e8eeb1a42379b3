"""Runs every operation of a cache in a forked process, and records forbidden actions such as writing files."""

import json
import os
import resource
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import TokenCache, tool
from data.cache.stream import stream
from tests.helpers.cache_contents import expected_codes, in_a_child

OPERATIONS: dict[str, Callable[[TokenCache], object]] = {
    "codes": lambda cache: [cache.codes(i) for i in range(len(cache))],
    "gather": lambda cache: [cache.clips.gather(np.array([i]), np.array([v])) for i, v in _clips(cache)],
    "facts": lambda cache: [cache.facts(i) for i in range(len(cache))],
    "members": lambda cache: [cache.members(i) for i in range(len(cache))],
    "timeline": lambda cache: [cache.timeline(i) for i in range(len(cache))],
    "pixels": lambda cache: [cache.pixels(i, v) for i, v in _clips(cache) if cache.spec["keep_pixels"] != "none"],
    "codebook": lambda cache: cache.codebook(),
    "stream": lambda cache: list(stream(cache)),
    "verify": lambda cache: cache.verify(),
    "show": lambda cache: tool._show(Namespace(caches=Path(cache.address).parent, cache=cache.address)),
}
"""Operations on an open cache, in this order."""

_RUN_CODE = {"exec", "compile", "import", "marshal.loads", "pickle.find_class", "ctypes.dlopen", "code.__new__"}
_START_PROGRAM = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
}
_CHANGE_SURROUNDINGS = {"socket.connect", "socket.bind", "urllib.Request", "os.putenv", "os.chdir"}
_ONLY_READ = {"os.scandir", "os.listdir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr"}
_TRUSTED_FOLDERS = {str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])}


@dataclass
class Outcome:
    """Result of running all operations."""

    errors: dict[str, str] = field(default_factory=dict)
    """Operation -> type and text of its exception."""
    undocumented: list[str] = field(default_factory=list)
    """Exceptions of types that no docstring mentions."""
    codes_match: bool = False
    """True if all codes are those that make_cache wrote."""
    events: list[str] = field(default_factory=list)
    """Forbidden actions: code that was run, programs, connections, written files."""
    memory: int = 0
    """Increase of the peak memory in bytes."""

    @property
    def refused_at(self) -> str | None:
        """The first operation with an exception."""
        return next(iter(self.errors), None)


def run_all(address: str | Path) -> Iterator[tuple[str, Exception | None]]:
    """Open a cache, run all operations, and yield the name and the exception of each."""
    try:
        cache = TokenCache.open(address)
    except Exception as error:
        yield "open", error
        return
    for name, operation in OPERATIONS.items():
        try:
            operation(cache)
        except Exception as error:
            yield name, error
        else:
            yield name, None


def audited(address: str | Path, notes: Path, timeout: float = 20.0) -> Outcome:
    """Run all operations in a child process, which writes the outcome to the file `notes`.

    Raises:
        TimeoutError: if the process runs longer than `timeout` seconds.
    """
    child = in_a_child(lambda: notes.write_text(json.dumps(asdict(_outcome(address)))))
    end = time.monotonic() + timeout
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            raise TimeoutError(f"{address} was still being read after {timeout} s")
        time.sleep(0.002)
    assert child.wait() == 0
    return Outcome(**json.loads(notes.read_text()))


def _outcome(address: str | Path) -> Outcome:
    outcome, recording = Outcome(), True

    def record(event: str, args: tuple[Any, ...]) -> None:
        if recording and _forbidden(event, args):
            outcome.events.append(f"{event} {args!r:.200}")

    sys.addaudithook(record)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, error in run_all(address):
        if error is not None:
            outcome.errors[name] = f"{type(error).__name__}: {error}"
            if not isinstance(error, (ValueError, KeyError, OSError)):
                outcome.undocumented.append(f"{type(error).__name__} of {name}: {error!s:.200}")
    unit = 1 if sys.platform == "darwin" else 1024
    outcome.memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    recording = False
    if not {"open", "codes"} & set(outcome.errors):
        cache = TokenCache.open(address)
        videos = enumerate(cache.videos)
        outcome.codes_match = all(np.array_equal(cache.codes(i), expected_codes(video.path)) for i, video in videos)
    return outcome


def _forbidden(event: str, args: tuple[Any, ...]) -> bool:
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        return bool(writes) or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
    if event in ("exec", "compile"):
        file = getattr(args[0], "co_filename", None) or (args[1] if len(args) > 1 else None)
        return not any(str(file).startswith(own) for own in _TRUSTED_FOLDERS) and not str(file).startswith("<frozen")
    if event == "import":
        allowed = {*sys.stdlib_module_names, "PIL", "numpy", "webdataset", "torch", "fsspec"}
        return args[0].partition(".")[0] not in allowed
    if event in _RUN_CODE | _START_PROGRAM | _CHANGE_SURROUNDINGS:
        return True
    return event.startswith(("os.", "shutil.", "tempfile.", "ftplib.", "smtplib.")) and event not in _ONLY_READ


def _clips(cache: TokenCache) -> list[tuple[int, int]]:
    return [(i, view) for i, views in enumerate(cache.views_N.tolist()) for view in range(min(views, 99))]
