"""A cache as a webdataset pipeline, for training code that is built on webdataset: checked, and without its openers.

webdataset opens an address by a shell command and unpickles what it finds. Here it only does what it is good at, sharing
out shards and chaining stages; shards are opened by storage.py and held against the manifest.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import webdataset

from data.cache.reader import TokenCache


def stream(cache: TokenCache, *, seed: int | None = None, epoch: int = 0) -> webdataset.DataPipeline:
    """All samples, shard by shard: `__key__`, `codes.npy` (array (V, t, h, w)), `json` (dict), `__url__`.

    Shards are shared out among nodes (torch.distributed) and data workers. Their order is that of the cache, or drawn
    from (seed, epoch). Chain what is wanted behind it, as in
    `stream(cache).compose(webdataset.shuffle(1000), webdataset.batched(32))`.

    Raises:
        DamagedCache: when a damaged sample is reached.
    """
    order = np.arange(len(cache.shards))
    if seed is not None:
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(order)
    return webdataset.DataPipeline(
        webdataset.SimpleShardList([str(number) for number in order]),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        partial(_samples, cache=cache),
    )


def _samples(shards: Iterable[dict[str, Any]], cache: TokenCache) -> Iterator[dict[str, Any]]:
    for entry in shards:
        shard = cache.shards[int(entry["url"])]
        for row in range(len(shard.video_N)):
            yield {
                "__key__": shard.key(row),
                "__url__": f"{cache.address}/{shard.file}",
                "codes.npy": shard.codes(row),
                "json": shard.facts(row),
            }
