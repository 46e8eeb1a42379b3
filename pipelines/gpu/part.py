"""Start of a part of the GPU check: its settings, and the channel for its rows."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipelines.benchmarks import Row
from pipelines.engine.signals import stop_with_parent


@dataclass(frozen=True)
class Setting:
    """Settings of a part.

    Attributes:
        dry: Run on the CPU with small models.
        work: Folder for files that parts share, deleted at the end of the check.
        videos: Folder of videos; None: videos are generated.
        end: Time at which the part is stopped, as time.monotonic() gives it.
    """

    dry: bool
    work: Path
    videos: Path | None
    end: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        """Return the seconds until the part is stopped."""
        return self.end - time.monotonic()


def run(measure: Callable[[Setting], Iterable[Row]]) -> None:
    """Run a part as a process: print each row as one line of JSON on stdout, and everything else on stderr."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    # The clock of time.monotonic() is the same in all processes.
    parser.add_argument("--end", type=float, default=time.monotonic() + 600)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    stop_with_parent()
    if not options.dry and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no CUDA device; `make gpu DRY=1` runs on the CPU", file=sys.stderr)
        sys.exit(2)
    rows = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Libraries and child processes print on stdout, which is for rows only.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setting = Setting(options.dry, options.work, options.videos, options.end)
    for row in measure(setting):
        print(json.dumps(asdict(row)), file=rows, flush=True)


def attempt(what: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield rows; if they fail, yield a row with the reason, so that the other rows of the part are still measured."""
    try:
        yield from rows()
    # A library or a compiler can raise any type of error on a GPU.
    except Exception as error:
        traceback.print_exc()
        yield Row(what, "", f"failed: {type(error).__name__}: {' '.join(str(error).split())[:1000]}")
