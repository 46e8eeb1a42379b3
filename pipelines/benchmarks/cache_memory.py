"""Memory while a cache is read that is larger than what the process may address."""

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
print(json.dumps({"start": rss[0], "end": rss[-1]}))
"""


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Growth of the resident memory from the first tenth of the reading to its end."""
    cache = synthetic_cache(
        folder / "large", numbered_videos(max(256, int(8000 * scale))), views=16, codes_shape=(8, 28, 28)
    )
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    limit = max(size * 2 // 3, 2**30)
    command = [sys.executable, "-c", _READER, str(cache), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    seen = json.loads(result.stdout)
    gib = 2**30
    yield Row(
        what=f"memory gained while reading {size / gib:.1f} GiB with {limit / gib:.1f} GiB of address space",
        unit="MiB",
        ours=(seen["end"] - seen["start"]) / 2**20,
        reach="flat",
    )
