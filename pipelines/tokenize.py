"""Stage one: write each video's codes once, as webdataset shards. Without a tokenizer it trains one first."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from typing import Any

from pipelines.engine.launch import command
from pipelines.settings.tokenize import Tokenize


def main(config: Tokenize, settings: str) -> dict[str, Any]:
    from pipelines.commands.tokenize import main as work  # after the flags are read: --help needs no torch

    return work(config, settings)


if __name__ == "__main__":
    command(Tokenize, main)
