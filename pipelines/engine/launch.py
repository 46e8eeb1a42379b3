"""Start of a command: parse settings, start processes, run the command, print its summary."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError

from pipelines.engine.config import parse
from pipelines.engine.console import fail

T = TypeVar("T")


def command(schema: type[T], body: Callable[[T, str], dict[str, Any]]) -> None:
    """Run a command: parse its flags, call `body(config, settings)`, print the summary as the last line of stdout.

    `body` imports torch only when it is called, because `--help` and mistyped flags do not need torch. A user's mistake ends
    with one line on stderr and exit code 2, a non-finite loss with exit code 1. With ARVIDEO_TRACEBACK=1 in the environment,
    the traceback of a mistake is shown instead.
    """
    name = Path(sys.argv[0]).stem
    show_traceback = bool(os.environ.get("ARVIDEO_TRACEBACK"))
    try:
        config, settings = parse(schema)
        # Imported after the flags are parsed: accelerate imports torch.
        from pipelines.engine.cpu_processes import start_cpu_processes

        start_cpu_processes()
        summary = body(config, settings)
    # safetensors reports a full disk as SafetensorError.
    except (ValueError, OSError, SafetensorError) as error:
        if show_traceback:
            raise
        _exit(name, str(error), 2)
    except FloatingPointError as error:
        _exit(name, str(error), 1)
    except RuntimeError as error:
        if type(error).__module__ != "torch._dynamo.exc" or show_traceback:
            raise
        _exit(name, f"--compile: {' '.join(str(error).splitlines()[:2])}; run without --compile", 2)
    except KeyboardInterrupt:
        fail(name, "interrupted; run the same command again to continue")
        sys.exit(130)
    import torch
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(json.dumps(summary), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _exit(name: str, message: str, code: int) -> NoReturn:
    """Print an error and exit. Ranks above 0 wait 3 s: rank 0 prints its error before the launcher kills all ranks."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    fail(name, message)
    sys.exit(code)
