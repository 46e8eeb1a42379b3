"""Clips of a cache as mp4: the pixels at the left, what their codes decode to at the right.

Legend: B clips, T H W C frames, height, width, colours.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from tqdm import tqdm

from data.cache import TokenCache
from data.shards import sample_id
from pipelines.source_clips import clips_of
from tokenizer import VideoTokenizer, load_tokenizer

_GAP = 8  # columns of white between the two


def export_clips(cache: TokenCache, rows: Sequence[int], tokenizer: str, out: Path) -> list[Path]:
    """Write the canonical view of each row, or all views in their order if they are dense, and return the files.

    Raises:
        ValueError: if the tokenizer is not the one that made the codes, or the pixels cannot be had again.
    """
    decoder = load_tokenizer(tokenizer)
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
        _write(files[-1], _side_by_side(cache, row, decoder), rate)
    return files


def _side_by_side(cache: TokenCache, row: int, decoder: VideoTokenizer) -> Iterator[np.ndarray]:
    """Frames (H, W, C) of a video; padding is left out."""
    cut = cache.views(row)
    views = range(len(cut)) if cache.clip.views == "dense" else [cache.canonical(row)]
    codes_Vthw = cache.codes(row)
    for view, pixels_THWC in zip(views, clips_of(cache, {row: views}), strict=True):
        codes_Bthw = torch.from_numpy(codes_Vthw[view : view + 1].astype(np.int64))
        decoded_THWC = decoder.decode(codes_Bthw)[0].numpy()
        gap_THWC = np.full((*pixels_THWC.shape[:2], _GAP, 3), 255, np.uint8)
        yield from np.concatenate([pixels_THWC, gap_THWC, decoded_THWC], axis=2)[: cut[view].real]


def _write(file: Path, frames: Iterator[np.ndarray], rate: float) -> None:
    """An mp4 that appears when it is whole."""
    temporary = file.with_suffix(".part.mp4")
    try:
        with av.open(str(temporary), "w") as container:
            stream = container.add_stream("mpeg4", rate=Fraction(rate).limit_denominator(1000))
            stream.pix_fmt = "yuv420p"
            stream.bit_rate = 4_000_000
            for number, frame in enumerate(map(_enlarged, frames)):
                if number == 0:
                    stream.height, stream.width = frame.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _enlarged(frame_HWC: np.ndarray) -> np.ndarray:
    """Pixel by pixel to a size that can be looked at, with an even number of rows and columns."""
    scale = max(1, 256 // frame_HWC.shape[0])
    large_HWC = frame_HWC.repeat(scale, 0).repeat(scale, 1)
    return np.pad(large_HWC, ((0, large_HWC.shape[0] % 2), (0, large_HWC.shape[1] % 2), (0, 0)), mode="edge")
