"""A command in a forked process, which does not import torch again. The kill and stop helpers start commands so."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.engine import launch


def fork_command(
    log: Path, schema: Any, main: Callable[..., Any], flags: Sequence[str], *, session: bool = False
) -> int:
    """Fork a process that runs a command, and append its output to a file; return its id. `session`: give it a session."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        if session:
            os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.argv = [f"{schema.__name__}.py", *flags]
        launch.command(schema, main)
        code = 0
    except SystemExit as stop:
        code = int(str(stop.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(process: int) -> int:
    """Wait for a process; return its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
