"""Start of a command: parse its settings, start its processes, run it, print its summary."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from pipelines.engine.config import parse
from pipelines.engine.console import fail

T = TypeVar("T")


def command(schema: type[T], body: Callable[[T, str], dict[str, Any]]) -> None:
    """Run a pipeline from the command line: parse, work, print the summary as the last line of stdout.

    A mistake of the user ends with one line on stderr and exit code 2. Set ARVIDEO_TRACEBACK=1 to see where it came from.
    """
    name = Path(sys.argv[0]).stem
    config, settings = parse(schema)
    from pipelines.engine.processes import start_cpu_processes  # after the flags are read: accelerate imports torch

    start_cpu_processes()
    try:
        summary = body(config, settings)
    except (ValueError, OSError, SafetensorError) as error:  # the last is what a full disk gives there
        if os.environ.get("ARVIDEO_TRACEBACK"):
            raise
        _let_main_process_speak()
        sys.exit(fail(name, str(error)))
    except FloatingPointError as error:
        _let_main_process_speak()
        fail(name, str(error))
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__module__ != "torch._dynamo.exc" or os.environ.get("ARVIDEO_TRACEBACK"):
            raise
        _let_main_process_speak()
        sys.exit(fail(name, f"--compile: {' '.join(str(error).splitlines()[:2])}; leave it out"))
    except KeyboardInterrupt:
        fail(name, "interrupted; run the same command again to continue")
        sys.exit(130)
    import torch
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(json.dumps(summary), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _let_main_process_speak() -> None:
    """What ends one process mostly ends them all: whoever started them ends the others when the main process has said it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
