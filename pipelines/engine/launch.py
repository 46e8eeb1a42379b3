"""Start of a command: parse settings, start processes, run the command, print its summary."""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError

from pipelines.engine.config import parse
from pipelines.engine.console import fail
from pipelines.engine.signals import Stopped, StopSignals, stop_with_parent

T = TypeVar("T")


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
    except Stopped as stop:
        # Loading processes that still import their modules would otherwise be waited for.
        for process in active_children():
            process.kill()
        _say_stopped(name, stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        fail(name, "interrupted; run the same command again to continue")
        sys.exit(130)


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
    # safetensors reports a full disk as SafetensorError.
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        _exit(name, str(error), 2)
    if isinstance(error, RuntimeError) and type(error).__module__ == "torch._dynamo.exc":
        _exit(name, f"--compile: {' '.join(str(error).splitlines()[:2])}; run without --compile", 2)


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
