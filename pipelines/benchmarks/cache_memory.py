"""Memory while a cache is read that is larger than the process may have."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pipelines.benchmarks import Row
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache

_ROOT = Path(__file__).parent.parent.parent
_READER = """
import json, resource, sys
import numpy as np
import psutil
from data.cache import TokenCache
from data.loading import BatchPlan, TokenDataset, batches

cache = TokenCache.open(sys.argv[1])
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
plan = BatchPlan(samples=len(cache), batch_size=32, seed=0)
steps = len(cache) * int(cache.views_N[0]) // 32
rss = []
for step, batch in enumerate(batches(TokenDataset(cache, range(len(cache)), plan), range(steps), workers=0)):
    if step in (steps // 10, steps - 1):
        rss.append(psutil.Process().memory_info().rss)
try:
    np.memmap(sys.argv[3], "u1", "r")
    mapped = True
except (OSError, MemoryError):
    mapped = False
print(json.dumps({"start": rss[0], "end": rss[-1], "mapped": mapped}))
"""


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Growth of the resident memory from the first tenth of the reading to its end."""
    cache = synthetic_cache(
        folder / "large", numbered_videos(max(256, int(8000 * scale))), views=16, codes_shape=(8, 28, 28)
    )
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    whole = folder / "large.bin"
    with open(whole, "wb") as file:  # as large as all shards, and empty: it is only mapped
        file.truncate(size)
    limit = max(size * 2 // 3, 2**30)
    command = [sys.executable, "-c", _READER, str(cache), str(limit), str(whole)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    seen = json.loads(result.stdout)
    gib = 2**30
    yield Row(
        what=f"memory gained while reading {size / gib:.1f} GiB under a limit of {limit / gib:.1f} GiB",
        unit="MiB",
        ours=(seen["end"] - seen["start"]) / 2**20,
        alternative="numpy.memmap: " + ("can be opened" if seen["mapped"] else "cannot be opened"),
        reach="flat",
    )
