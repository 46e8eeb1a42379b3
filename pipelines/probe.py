"""Evaluate a frozen pre-trained model with probes, compared with the same probes on baselines without pre-training."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipelines.engine.launch import command
from pipelines.settings.probe import Probe


def main(config: Probe, settings: str) -> dict:
    from pipelines.commands.probe import main as run_command

    return run_command(config, settings)


if __name__ == "__main__":
    command(Probe, main)
