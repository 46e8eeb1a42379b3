"""Report what this machine can run: versions, devices, attention kernels, compiler, decoders, memory, disk.

Each problem comes with the change that would solve it. The exit code is 0 if nothing needs a fix, else 1.
"""

# Started as a file: search the repository instead of pipelines/, whose tokenize.py would hide Python's own tokenize.
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import sys

from pipelines.engine.environment import checks


def main() -> int:
    """Print the report; return 0 if nothing needs a fix, else 1."""
    description = "Report what this machine can run, and how to fix what it cannot."
    argparse.ArgumentParser("doctor", description=description, allow_abbrev=False).parse_args()
    fixes = 0
    for check in checks():
        print(f"{check.name:<24} {check.state}", flush=True)
        if check.fix:
            fixes += 1
            print(f"{'':<24} fix: {check.fix}", flush=True)
    print("\nnothing needs a fix" if not fixes else f"\n{fixes} of the points above can be fixed")
    return 1 if fixes else 0


if __name__ == "__main__":
    sys.exit(main())
