"""Fine-tune a pre-trained model to a classifier of labelled videos."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipelines.engine.launch import command
from pipelines.settings.finetune import Finetune


def main(config: Finetune, settings: str) -> dict:
    from pipelines.commands.finetune import main as run_command

    return run_command(config, settings)


if __name__ == "__main__":
    command(Finetune, main)
