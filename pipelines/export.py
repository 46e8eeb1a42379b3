"""Write clips of a cache as mp4: their pixels beside what their codes decode to."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from typing import Any

from pipelines.engine.launch import command
from pipelines.settings.export import Export


def main(config: Export, settings: str) -> dict[str, Any]:
    from pipelines.commands.export import main as work  # after the flags are read: --help needs no torch

    return work(config, settings)


if __name__ == "__main__":
    command(Export, main)
