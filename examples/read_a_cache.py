"""Read a token cache: names, labels, codes, first frames of clips, and shuffled batches.

    python examples/read_a_cache.py CACHE

CACHE is a folder below `caches/` or an https, http, s3, gs or hf address.
"""

import sys

from data import TokenCache
from data.loading import BatchPlan, TokenDataset, batches


def main() -> None:
    cache = TokenCache.open(sys.argv[1])
    print(f"{cache.name}: {len(cache)} videos, {cache.layout.vocab_size} codes, clips of {cache.clip.frames} frames")
    for index in range(min(3, len(cache))):
        video, codes_VTHW = cache.videos[index], cache.codes(index)
        print(f"{video.path}, label {video.label}: {codes_VTHW.shape} from frame {cache.views(index)[0].start}")

    # Batches are a pure function of (seed, step): any number of processes and workers gives the same sequence.
    plan = BatchPlan(samples=len(cache), batch_size=4, seed=0)
    dataset = TokenDataset(cache, range(len(cache)), plan)
    for step, batch in enumerate(batches(dataset, range(3), workers=0)):
        print(f"step {step}: codes_BTHW {tuple(batch['codes_BTHW'].shape)}, rows {batch['row_B'].tolist()}")


if __name__ == "__main__":
    main()
