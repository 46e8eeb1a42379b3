"""Upload the model of a run to the Hugging Face hub."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipelines.engine.launch import command
from pipelines.settings.push_to_hub import PushToHub


def main(config: PushToHub, settings: str) -> dict:
    from pipelines.commands.push_to_hub import main as run_command

    return run_command(config, settings)


if __name__ == "__main__":
    command(PushToHub, main)
