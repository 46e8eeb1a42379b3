"""Measure this project beside the alternative, as ratios within one run."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from typing import Any

from pipelines.engine.launch import command
from pipelines.settings.benchmark import Benchmark


def main(config: Benchmark, settings: str) -> dict[str, Any]:
    from pipelines.benchmarks.suite import main as work  # after the flags are read: --help needs no torch

    return work(config, settings)


if __name__ == "__main__":
    command(Benchmark, main)
