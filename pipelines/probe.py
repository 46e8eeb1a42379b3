"""Frozen evaluation of a pre-trained model, beside the same probe on baselines that know nothing of pre-training."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from typing import Any

from pipelines.engine.launch import command
from pipelines.settings.probe import Probe


def main(config: Probe, settings: str) -> dict[str, Any]:
    from pipelines.commands.probe import main as work  # after the flags are read: --help needs no torch

    return work(config, settings)


if __name__ == "__main__":
    command(Probe, main)
