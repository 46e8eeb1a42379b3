"""Train VQ3D, this project's tokenizer, on a folder of videos."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipelines.engine.launch import command
from pipelines.settings.train_tokenizer import TrainTokenizer


def main(config: TrainTokenizer, settings: str) -> dict:
    from pipelines.commands.train_tokenizer import main as run_command

    return run_command(config, settings)


if __name__ == "__main__":
    command(TrainTokenizer, main)
