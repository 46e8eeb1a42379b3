"""Measure the memory of a real training step: `python -m tests.helpers.step_memory FLAGS`, with flags of pretrain_ar.

Prints the peak resident bytes of the second step minus those before the model was built. The same run is done once before,
so that memory kept by libraries, such as compiled code, does not count. Start it in a new process with
MALLOC_MMAP_THRESHOLD_=65536, so that the C library returns freed memory.
"""

import contextlib
import ctypes
import gc
import sys
from typing import Any
from unittest.mock import patch

import psutil
from accelerate.state import AcceleratorState, GradientState, PartialState

from pipelines.commands import pretrain_ar
from pipelines.engine import network, training
from pipelines.engine.config import parse
from pipelines.engine.memory import Resident

_step = training._step


class LastStepDone(Exception):
    """Raised to stop training after the requested steps."""


def main(flags: list[str]) -> None:
    _run(flags, steps=1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    print(_run(flags, steps=2) - before)


def _run(flags: list[str], steps: int) -> int:
    """Train for some steps; return the peak resident bytes of the last step."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    peaks: list[int] = []

    def watched(*inputs: Any) -> Any:
        with Resident() as resident:
            losses = _step(*inputs)
        peaks.append(resident.most)
        if len(peaks) == steps:
            raise LastStepDone
        return losses

    # Use the requested attention kernel without timing all of them.
    kernel = patch.object(network, "_attention", lambda *inputs: inputs[-1].attention)
    with kernel, patch.object(training, "_step", watched), contextlib.suppress(LastStepDone):
        pretrain_ar.main(*parse(pretrain_ar.Pretrain, flags))
    return peaks[-1]


if __name__ == "__main__":
    main(sys.argv[1:])
