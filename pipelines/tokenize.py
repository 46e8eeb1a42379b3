"""Stage one: encode each video once and write its codes to webdataset shards; fits a linear tokenizer first by default."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipelines.engine.launch import command
from pipelines.settings.tokenize import Tokenize


def main(config: Tokenize, settings: str) -> dict:
    from pipelines.commands.tokenize import main as run_command

    return run_command(config, settings)


if __name__ == "__main__":
    command(Tokenize, main)
