"""A part of the GPU check with two rows, and output that is no row on stderr."""

import json
import sys

ROWS = [
    {"what": "speed | a", "unit": "clips/s", "ours": 2.5, "peer": 2.0, "ratio": 1.25},
    {"what": "b", "unit": "", "ours": "text"},
]

if __name__ == "__main__":
    print("some output", file=sys.stderr)
    for row in ROWS:
        print(json.dumps(row), flush=True)
