"""Start of a command: parse settings, start processes, run the command, print its summary."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError

from data.text import one_line
from pipelines.engine.config import parse
from pipelines.engine.console import fail
from pipelines.engine.signals import Stopped, StopSignals, stop_with_parent

T = TypeVar("T")
_END_BY_LAUNCHER = 30.0
"""Seconds in which a launcher ends the other processes of a run after the failure of one."""


def command(schema: type[T], body: Callable[[T, str], dict[str, Any]]) -> None:
    """Run a command: parse its flags, call `body(config, settings)`, print the summary as the last line of stdout.

    `body` imports torch only when it is called, because `--help` and mistyped flags do not need torch. A user's mistake ends
    with one line on stderr and exit code 2, a non-finite loss with exit code 1, Ctrl-C with 130, SIGTERM with 143 and SIGUSR1
    with 138. With ARVIDEO_TRACEBACK=1 in the environment, the traceback of a mistake is shown instead.
    """
    name = Path(sys.argv[0]).stem
    try:
        with StopSignals(partial(_say_stopped, name)) as signals:
            stop_with_parent()
            try:
                _run(schema, body)
            except Exception as error:
                # After a signal, errors are its consequences, such as another process of the run that has ended.
                if signals.stop:
                    raise signals.stop from None
                _report(name, error)
                raise
    except (KeyboardInterrupt, Stopped) as error:
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        # Loading processes that still load a batch or import their modules would otherwise be waited for.
        for process in active_children():
            process.kill()
        _say_stopped(name, stop)
        sys.exit(stop.exit_code)


def _run(schema: type[T], body: Callable[[T, str], dict[str, Any]]) -> None:
    config, settings = parse(schema)
    # Imported after the flags are parsed: accelerate imports torch.
    from pipelines.engine.cpu_processes import start_cpu_processes

    start_cpu_processes()
    summary = body(config, settings)
    import torch
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(json.dumps(summary), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _report(name: str, error: Exception) -> None:
    """Exit with one line for an error with a known cause, unless tracebacks are asked for. Return for any other error."""
    if isinstance(error, FloatingPointError):
        _exit(name, str(error), 1)
    if os.environ.get("ARVIDEO_TRACEBACK"):
        return
    if _lost_connection(error):
        # The other process reports its error, and the launcher ends this one.
        try:
            time.sleep(_END_BY_LAUNCHER)
        except Stopped as stop:
            sys.exit(stop.exit_code)
        _exit(name, f"another process of this run has ended, or its network failed ({one_line(error, 200)})", 1)
    # safetensors reports a full disk as SafetensorError.
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        _exit(name, str(error), 2)
    if isinstance(error, RuntimeError) and type(error).__module__ == "torch._dynamo.exc":
        _exit(name, f"--compile: {' '.join(str(error).splitlines()[:2])}; run without --compile", 2)


def _lost_connection(error: Exception) -> bool:
    """Return whether an error means that another process of the run cannot be reached, most often because it has failed."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    # gloo has no type of its own; its messages begin with its file in which the error occurred.
    return isinstance(error, DistError) or "gloo" in str(error).partition("]")[0]


def _say_stopped(name: str, stop: Stopped) -> None:
    """Print that a signal has stopped the command; with several processes, the first one prints it."""
    if os.environ.get("RANK", "0") == "0":
        fail(name, f"{stop}; run the same command again to continue")


def _exit(name: str, message: str, code: int) -> NoReturn:
    """Print an error and exit. Ranks above 0 wait 3 s: rank 0 prints its error before the launcher kills all ranks."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    fail(name, message)
    sys.exit(code)
