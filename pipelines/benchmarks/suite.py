"""Run the measurements of a benchmark and print their table."""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.sources import Source, load_source
from data.text import table
from pipelines.benchmarks import (
    Row,
    cache_damage,
    cache_memory,
    cache_reading,
    cache_reuse,
    cache_tokenizing,
    pretrain_growth,
    pretrain_speed,
    search_speed,
    tokenizer_cuda,
    tokenizer_length,
    tokenizer_quality,
)
from pipelines.engine.device import device_name, start_accelerator
from pipelines.engine.run_files import RUNS
from pipelines.settings.benchmark import Benchmark


def main(config: Benchmark, settings: str) -> dict[str, Any]:
    """Run the measurements, print each row as it is measured and the table at the end, and return the summary."""
    # Load the source first, so that a wrong path is reported before the measurements.
    source = load_source(config.videos)
    device = start_accelerator().device
    began = time.perf_counter()
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="arvideo-benchmark-") as folder:
            for row in _measure(config, source, Path(folder), device):
                rows.append(row)
                seconds = time.perf_counter() - began
                print(f"{seconds:5.0f} s  {'  '.join(row.texts())}", file=sys.stderr, flush=True)
    finally:
        # After a failure or Ctrl-C, print the rows measured so far.
        if rows:
            print(table(["what", "arvideo", "alternative", "ratio", "target"], [row.texts() for row in rows]))
    return {
        "table": [{**asdict(row), "device": device_name(device)} for row in rows],
        "device": device_name(device),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _measure(config: Benchmark, source: Source, folder: Path, device: torch.device) -> Iterator[Row]:
    """Yield the rows of the chosen benchmark as they are measured."""
    clip, scale = config.clip, config.scale
    if config.what == "tokenizer":
        yield from tokenizer_quality.measure(source, clip, device, scale)
        yield from tokenizer_length.measure(source, clip, device)
        yield from tokenizer_cuda.measure(source, clip, device, scale)
    elif config.what == "pretrain":
        yield from pretrain_speed.measure(folder, source, device, scale)
        yield from pretrain_growth.measure(RUNS / "benchmark-pretrain", device, scale)
    elif config.what == "search":
        yield from search_speed.measure(folder, scale)
    else:
        yield from cache_reading.measure(folder, scale)
        yield from cache_tokenizing.measure(folder, source, clip)
        yield from cache_reuse.measure(folder, scale)
        yield from cache_memory.measure(folder, scale)
        yield from cache_damage.measure(folder, scale)
