"""List all runs, newest first: what they trained, on which cache, how far they are, and their main results."""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from data.text import print_text, printable_lines, table
from pipelines.engine.console import fail
from pipelines.engine.run_files import RUNS
from pipelines.engine.run_list import RunEntry, list_runs


def main() -> int:
    """Print the table; return 0, or 2 if there is no such folder."""
    parser = argparse.ArgumentParser("runs", description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=RUNS, help="Folder of the runs (default: runs).")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON instead of text.")
    arguments = parser.parse_args()
    if not arguments.runs.is_dir():
        return fail("runs", f"--runs {arguments.runs}: no such folder")
    entries = list_runs(arguments.runs)
    head = ["run", "command", "what", "cache", "state", "results", "when"]
    text = table(head, [_row(entry) for entry in entries]) if entries else f"no runs in {arguments.runs}"
    print_text(json.dumps([asdict(entry) for entry in entries]) if arguments.json else printable_lines(text))
    return 0


def _row(entry: RunEntry) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
    return [Path(entry.run).name, entry.command, entry.what, entry.cache, entry.state, entry.numbers, when]


if __name__ == "__main__":
    sys.exit(main())
