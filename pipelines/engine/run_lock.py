"""Lock of a run folder: one start of a command at a time writes into it.

The lock is flock on a file of the folder. The system releases it when the owner ends, however it ends. On NFS the server keeps
it, so it holds between machines. File systems without locks, such as Lustre mounted without `flock`, give no protection.
"""

import fcntl
import os
import platform
import time
from pathlib import Path
from typing import IO

PATIENCE = 15.0
"""Seconds to wait for an owner that is about to end, such as a run that saves a checkpoint after a signal."""


def lock(folder: Path) -> IO[str]:
    """Lock a folder. The lock is held until the returned file is closed or the process ends.

    Raises:
        ValueError: if another start of a command holds the lock; the message names its process and machine.
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
                with file:
                    owner = file.read(200).strip()
                raise ValueError(
                    f"--out {folder}: in use by {owner}; wait for its end, or choose another --out"
                ) from None
            time.sleep(0.1)
        except OSError:
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
