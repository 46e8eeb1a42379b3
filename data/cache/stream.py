"""A cache as a webdataset pipeline, for training code that is built on webdataset.

webdataset itself would open addresses with a shell command and unpickle members. Here, it only splits shards among nodes
and workers and chains stages, while storage.py reads the shards. Every sample is checked.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import webdataset

from data.cache.reader import TokenCache


def stream(cache: TokenCache, *, seed: int | None = None, epoch: int = 0) -> webdataset.DataPipeline:
    """Return a pipeline of all samples, shard by shard: `__key__`, `codes.npy` (V, t, h, w), `json` (dict), `__url__`.

    Shards are split among nodes (torch.distributed) and data workers. Append stages with `compose`, such as
    `stream(cache).compose(webdataset.shuffle(1000), webdataset.batched(32))`. The order of the shards is drawn from
    (seed, epoch). Without a seed, it is the order of the cache. The pipeline raises DamagedCache at a damaged sample.
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
