"""Lock of a run folder: one start of a command at a time writes into it.

The lock is flock on a file of the folder. The system releases it when the owner ends, however it ends. On NFS the server keeps
it, so it holds between machines. File systems without locks, such as Lustre mounted without `flock`, give no protection.
"""

import fcntl
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

PATIENCE = 15.0
"""Seconds to wait for an owner that is about to end, such as a run that saves a checkpoint after a signal."""
_BEGINS = "process "


def lock(folder: Path, waiting: Callable[[str], None] | None = None) -> IO[str]:
    """Lock a folder. The lock is held until the returned file is closed or the process ends.

    Args:
        waiting: called once with the process and machine of the owner, which is then waited for without a limit of time.

    Raises:
        ValueError: if another start of a command holds the lock; the message names its process and machine.
            Or if the folder contains a file named `lock` that is not a lock.
        OSError: if the file of the lock cannot be opened, for example because it is a symbolic link.
    """
    # A link in a downloaded folder could point to a file of the user, which would be truncated.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    file = os.fdopen(os.open(folder / "lock", flags, 0o666), "r+", encoding="utf-8", errors="replace")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = file.read(200).strip()
                if waiting is None:
                    file.close()
                    raise ValueError(
                        f"--out {folder}: in use by {owner}; wait for its end, or choose another --out"
                    ) from None
                waiting(owner)
                deadline = math.inf
            time.sleep(0.1)
        except OSError:
            break
    file.seek(0)
    if (content := file.read(len(_BEGINS))) not in ("", _BEGINS):
        file.close()
        raise ValueError(
            f"--out {folder}: contains a file `lock` of something else (it begins with {content!r}); choose another --out"
        )
    file.seek(0)
    file.truncate()
    file.write(f"{_BEGINS}{os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
