"""Evaluate a fine-tuned classifier on labelled videos."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipelines.engine.launch import command
from pipelines.settings.evaluate import Evaluate


def main(config: Evaluate, settings: str) -> dict:
    from pipelines.commands.evaluate import main as run_command

    return run_command(config, settings)


if __name__ == "__main__":
    command(Evaluate, main)
