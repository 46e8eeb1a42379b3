"""Time until a second experiment on the same 100,000 videos has codes: open the cache, or run tokenize again."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data.cache import TokenCache
from data.loading import BatchPlan, TokenDataset, batches
from data.sources import load_source
from pipelines.benchmarks import Row
from pipelines.benchmarks.synthetic import synthetic_cache
from pipelines.engine.signals import child_environment
from tokenizer import VQ3D


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Yield the seconds until codes are available.

    The video files are invalid, so tokenize would report any file that it decodes as skipped.

    Raises:
        RuntimeError: if tokenize decodes a video or creates the cache again.
    """
    count = int(100_000 * scale)
    videos = folder / "many"
    for label in range(10):
        (videos / f"class{label}").mkdir(parents=True)
    for i in range(count):
        (videos / f"class{i % 10}" / f"{i:07d}.mp4").write_bytes(b"no video")
    torch.manual_seed(0)
    tokenizer = VQ3D().eval()
    tokenizer.save_pretrained(folder / "tokenizer")
    source = load_source(str(videos))
    cache = synthetic_cache(folder / "reused", source.videos, views=1, tokenizer=tokenizer.fingerprint())

    began = time.perf_counter()
    opened = TokenCache.open(cache)
    plan = BatchPlan(samples=len(opened), batch_size=64, seed=0)
    next(batches(TokenDataset(opened, range(len(opened)), plan), range(1), workers=0))
    seconds = time.perf_counter() - began
    yield Row(f"open a cache of {count:,} videos and read the first shuffled batch", "s", seconds, reach="≤ 5")

    flags = ["--videos", str(videos), "--tokenizer", str(folder / "tokenizer"), "--caches", str(folder / "reused")]
    began = time.perf_counter()
    command = [sys.executable, str(Path(__file__).parents[1] / "tokenize.py"), *flags, "--out", str(folder / "run")]
    result = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    summary = json.loads(result.stdout.splitlines()[-1])
    if not summary["reused"] or summary["skipped"]:
        raise RuntimeError(f"tokenize did not reuse the cache: {summary}")
    yield Row(f"run tokenize again on {count:,} videos, the whole command", "s", seconds, reach="≤ 5")
