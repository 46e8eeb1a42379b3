"""Child process of `cache_memory`: read a whole cache under a limit on the address space and print the resident memory."""

import json
import resource
import sys

import psutil

from data.cache import TokenCache
from data.loading import BatchPlan, TokenDataset, batches


def main(address: str, limit: int) -> None:
    """Print {"start": …, "end": …}: resident bytes after a tenth of the batches and after the last one."""
    cache = TokenCache.open(address)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    plan = BatchPlan(samples=len(cache), batch_size=32, seed=0)
    steps = len(cache) * int(cache.views_N[0]) // 32
    dataset = TokenDataset(cache, range(len(cache)), plan)
    resident = []
    for step, _ in enumerate(batches(dataset, range(steps), workers=0)):
        if step in (steps // 10, steps - 1):
            resident.append(psutil.Process().memory_info().rss)
    print(json.dumps({"start": resident[0], "end": resident[-1]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
