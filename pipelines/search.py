"""Find the videos with the most similar features."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipelines.engine.launch import command
from pipelines.settings.search import Search


def main(config: Search, settings: str) -> dict:
    from pipelines.commands.search import main as run_command

    return run_command(config, settings)


if __name__ == "__main__":
    command(Search, main)
