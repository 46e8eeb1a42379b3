"""Export clips of a cache as mp4: pixels on the left, decoded codes on the right.

Legend: B clips, T H W C frames, height, width, channels, V views, t h w grid of codes.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.cache import TokenCache, find_cache
from data.cache.reader import find_row
from data.source_clips import clips_of
from pipelines.engine.console import say_newest
from pipelines.engine.recorded_tokenizer import check_tokenizer, load_recorded_tokenizer
from pipelines.reporting.movies import MAX_RATE, MIN_RATE, side_by_side, write_mp4
from pipelines.settings.export import Export
from tokenizer import VideoTokenizer, load_tokenizer

_DEFAULT_COUNT = 4
_DEFAULT_RATE = 16
"""Frames per second of videos whose frame rate is unknown."""


def main(config: Export, settings: str) -> dict[str, Any]:
    """Export the chosen videos, by default four videos spread over the cache, and return the files."""
    cache = TokenCache.open(find_cache(config.caches, config.cache))
    say_newest("--cache", config.cache, cache.address)
    rows = [find_row(cache, name) for name in config.sample]
    if not rows:
        rows = sorted({i * (len(cache) - 1) // (_DEFAULT_COUNT - 1) for i in range(_DEFAULT_COUNT)})
    if config.tokenizer is None:
        decoder = load_recorded_tokenizer(cache, trust=config.trust)
    else:
        decoder = load_tokenizer(config.tokenizer, trust=config.trust)
        check_tokenizer(cache, f"--tokenizer {config.tokenizer}", decoder)
    # Caches of the same videos must not replace each other's files.
    out = Path("export", cache.name) if config.out is None else config.out
    files = export_clips(cache, rows, decoder, out)
    return {"cache": cache.address, "out": str(out), "files": [str(file) for file in files]}


def export_clips(cache: TokenCache, rows: Sequence[int], decoder: VideoTokenizer, out: Path) -> list[Path]:
    """Write one mp4 per row and return the files. An mp4 shows the canonical view, or all views in order if they are dense.

    Raises:
        ValueError: if the pixels are not available.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for row in tqdm(rows, desc="export", disable=None):
        # Videos with damaged time stamps may have any recorded rate.
        rate = min(max(MIN_RATE, (cache.facts(row)["rate"] or _DEFAULT_RATE) / cache.clip.stride), MAX_RATE)
        files.append(out / f"{row:06d}-{_file_name(cache.videos[row].path)}.mp4")
        write_mp4(files[-1], _frames(cache, row, decoder), rate)
    return files


def _file_name(path: str) -> str:
    """Return the path of a video without its ending as a name that every file system accepts, the last 100 characters."""
    return re.sub(r"[^\w.-]+", "_", str(PurePosixPath(path).with_suffix("")), flags=re.ASCII)[-100:]


def _frames(cache: TokenCache, row: int, decoder: VideoTokenizer) -> Iterator[np.ndarray]:
    """Yield the valid frames (H, W, C) of a video, original and decoded frame side by side."""
    cuts = cache.views(row)
    views = range(len(cuts)) if cache.clip.views == "dense" else [cache.canonical(row)]
    codes_Vthw = cache.codes(row)
    for view, pixels_THWC in zip(views, clips_of(cache, {row: views}), strict=True):
        codes_Bthw = torch.from_numpy(codes_Vthw[view : view + 1].astype(np.int64))
        decoded_THWC = decoder.decode(codes_Bthw)[0].numpy()
        yield from side_by_side(pixels_THWC, decoded_THWC)[: cuts[view].real]
