"""What a real training step takes: `python -m tests.helpers.step_memory FLAGS`, those of pretrain_ar, in a fresh process.

Prints the most bytes that were resident in the second step less those before there were weights. What the libraries keep by
themselves, such as code compiled for the sizes of the run, is there by then: the same run has been started before. Start it with
MALLOC_MMAP_THRESHOLD_=65536, or the C library does not give back what is freed.
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
from pipelines.engine import training
from pipelines.engine.config import parse
from pipelines.engine.memory import Resident

_step = training._step


class Over(Exception):
    """The last step that was asked for."""


def main(flags: list[str]) -> None:
    _run(flags, steps=1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    print(_run(flags, steps=2) - before)


def _run(flags: list[str], steps: int) -> int:
    """The most bytes that are resident in the last of some steps."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    seen: list[int] = []

    def watched(*inputs: Any) -> Any:
        with Resident() as resident:
            losses = _step(*inputs)
        seen.append(resident.most)
        if len(seen) == steps:
            raise Over
        return losses

    kernel = patch.object(pretrain_ar, "_attention", lambda *inputs: inputs[-1].attention)  # without a trial
    with kernel, patch.object(training, "_step", watched), contextlib.suppress(Over):
        pretrain_ar.main(*parse(pretrain_ar.Pretrain, flags))
    return seen[-1]


if __name__ == "__main__":
    main(sys.argv[1:])
