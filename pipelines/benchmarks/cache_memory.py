"""Memory of a process that reads a cache larger than its address space."""

import json
from collections.abc import Iterator
from pathlib import Path

from pipelines.benchmarks import Row, run_module
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Yield the growth of resident memory between the first tenth of the reading and its end."""
    cache = synthetic_cache(
        folder / "large", numbered_videos(max(256, int(8000 * scale))), views=16, codes_shape=(8, 28, 28)
    )
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    # At a small scale the limit still has to leave room for Python and PyTorch.
    limit = max(size * 2 // 3, 2**30)
    resident = json.loads(run_module("cache_memory_reader", str(cache), str(limit)))
    gib = 2**30
    yield Row(
        what=f"memory gained while reading {size / gib:.1f} GiB with {limit / gib:.1f} GiB of address space",
        unit="MiB",
        ours=(resident["end"] - resident["start"]) / 2**20,
        reach="flat",
    )
