"""Clips of a cache as mp4: the pixels at the left, what their codes decode to at the right.

Legend: B clips, T H W C frames, height, width, colours.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.cache import TokenCache, find_cache
from data.cache.reader import find_row
from data.shards import sample_id
from data.source_clips import clips_of
from pipelines.reporting.movies import side_by_side, write_mp4
from pipelines.settings.export import Export
from tokenizer import VideoTokenizer, load_tokenizer


def main(config: Export, settings: str) -> dict[str, Any]:
    cache = TokenCache.open(find_cache(config.caches, config.cache))
    rows = [find_row(cache, wanted) for wanted in config.sample]
    rows = rows or sorted({i * (len(cache) - 1) // 3 for i in range(4)})
    tokenizer = config.tokenizer or cache.made_with["tokenizer"]
    files = export_clips(cache, rows, tokenizer, config.out, trust=config.trust)
    return {"cache": cache.address, "out": str(config.out), "files": [str(file) for file in files]}


def export_clips(
    cache: TokenCache, rows: Sequence[int], tokenizer: str, out: Path, *, trust: bool = False
) -> list[Path]:
    """Write the canonical view of each row, or all views in their order if they are dense, and return the files.

    Raises:
        ValueError: if the tokenizer is not the one that made the codes, or the pixels cannot be had again.
    """
    decoder = load_tokenizer(tokenizer, trust=trust)
    if decoder.fingerprint() != cache.spec["tokenizer"]:
        raise ValueError(
            f"--tokenizer {tokenizer}: is not the one that made {cache.address}; its codes mean other things"
        )
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for row in tqdm(rows, desc="export", disable=None):
        facts = cache.facts(row)
        rate = (facts["rate"] or 16) / cache.clip.stride
        files.append(out / f"{row:06d}-{sample_id(cache.videos[row].path)}.mp4")
        write_mp4(files[-1], _frames(cache, row, decoder), rate)
    return files


def _frames(cache: TokenCache, row: int, decoder: VideoTokenizer) -> Iterator[np.ndarray]:
    """Frames (H, W, C) of a video; padding is left out."""
    cut = cache.views(row)
    views = range(len(cut)) if cache.clip.views == "dense" else [cache.canonical(row)]
    codes_Vthw = cache.codes(row)
    for view, pixels_THWC in zip(views, clips_of(cache, {row: views}), strict=True):
        codes_Bthw = torch.from_numpy(codes_Vthw[view : view + 1].astype(np.int64))
        decoded_THWC = decoder.decode(codes_Bthw)[0].numpy()
        yield from side_by_side(pixels_THWC, decoded_THWC)[: cut[view].real]
