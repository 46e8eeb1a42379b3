"""Memory of a process that reads a cache larger than its address space."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from data.cache import TokenCache
from data.loading import BatchPlan, TokenDataset, batches
from pipelines.benchmarks import Row, in_new_process
from pipelines.benchmarks.synthetic import numbered_videos, synthetic_cache


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Yield the growth of resident memory after the first tenth of the batches."""
    videos = numbered_videos(max(256, int(8000 * scale)))
    cache = synthetic_cache(folder / "large", videos, views=16, codes_shape=(8, 28, 28))
    size = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    gib = 2**30
    # At least 1 GiB, because Python and PyTorch need address space too.
    limit = max(size * 2 // 3, gib)
    what = f"growth of memory while reading {size / gib:.1f} GiB with {limit / gib:.1f} GiB of address space"
    yield Row(what, "MiB", in_new_process(_growth, str(cache), limit) / 2**20, reach="flat")


def _growth(address: str, limit: int) -> int:
    """Read a whole cache under a limit of the address space. Return the growth in resident bytes after the first tenth."""
    cache = TokenCache.open(address)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    plan = BatchPlan(samples=len(cache), batch_size=32, seed=0)
    steps = len(cache) * int(cache.views_N[0]) // 32
    dataset = TokenDataset(cache, range(len(cache)), plan)
    resident = []
    for step, _ in enumerate(batches(dataset, range(steps), workers=0)):
        if step in (steps // 10, steps - 1):
            resident.append(psutil.Process().memory_info().rss)
    return resident[-1] - resident[0]
