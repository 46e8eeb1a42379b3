"""A part of the GPU check that starts a process, prints its id as a row, and never ends."""

import json
import subprocess
import sys
import time

if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(json.dumps({"what": "process", "unit": "", "ours": float(child.pid)}), flush=True)
    time.sleep(600)
