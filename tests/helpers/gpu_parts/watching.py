"""Part of a GPU check that prints its process id and watches its parent, as all parts do."""

import json
import os
import time

from pipelines.engine.signals import stop_with_parent

stop_with_parent()
print(json.dumps({"what": "process", "unit": "", "ours": os.getpid()}), flush=True)
time.sleep(600)
