"""Encoding of long videos: streaming compared with a single forward pass, and the memory of streaming."""

from collections.abc import Iterator
from itertools import chain
from statistics import median

import torch

from data.clip_spec import ClipSpec
from data.source_clips import held_out_clips
from data.sources import Source
from pipelines.benchmarks import Row, comparison, in_new_process
from pipelines.engine.encoding import reproducible
from pipelines.engine.memory import Resident
from tokenizer import VQ3D

_NAMES = ("vq3d-causal-4x8x8-fsq4375", "vq3d-small-causal-4x8x8-fsq4375", "vq3d-2x8x8-fsq1000")
_FRAMES = 1000
_FRAMES_OF_A_PIECE = 10


def measure(source: Source, clip: ClipSpec, device: torch.device) -> Iterator[Row]:
    """Yield the number of codes in which streaming differs from one pass for each tokenizer, and the memory of streaming.

    The video is a concatenation of held-out clips, repeated to 1,000 frames. The tokenizers have random weights.
    """
    clips_NTHWC = held_out_clips(source, clip, 96, {})
    frames = clips_NTHWC.shape[0] * clips_NTHWC.shape[1]
    video_BTHWC = clips_NTHWC.flatten(0, 1).repeat(1 + (_FRAMES + 1) // frames, 1, 1, 1)[None]
    for name in _NAMES:
        torch.manual_seed(0)
        tokenizer = VQ3D(name=name).eval().to(device)
        # A causal tokenizer of stride 4 encodes 4k + 1 frames.
        pixels_BTHWC = video_BTHWC[:, : _FRAMES + 1 if tokenizer.causal else _FRAMES].to(device)
        with reproducible(), torch.no_grad():
            differ = (tokenizer.encode(pixels_BTHWC) != tokenizer.encode_piece(pixels_BTHWC)).sum().item()
        what = f"codes of {pixels_BTHWC.shape[1]:,} frames that differ between a stream and one pass, {name}"
        yield Row(what, "codes", float(differ), reach="0")
    short, long = (median(in_new_process(_peak_memory, frames) for _ in range(3)) for frames in (100, _FRAMES))
    what = "memory of the process that encodes a stream of 1,000 frames of 128x128"
    yield comparison(what, "MiB", long / 2**20, short / 2**20, "100 frames", "≤ 1.1")


def _peak_memory(frames: int) -> int:
    """Encode a stream of `frames` + 1 frames of 128x128, and return the peak resident bytes of the process.

    `frames` must be a multiple of 20, because pieces have ten frames and a causal tokenizer of stride 4 encodes 4k + 1 frames.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = VQ3D(name=_NAMES[0]).eval()
    shape = (1, _FRAMES_OF_A_PIECE, 128, 128, 3)
    pieces = (torch.randint(256, shape, dtype=torch.uint8) for _ in range(frames // _FRAMES_OF_A_PIECE))
    last = torch.zeros(1, 1, 128, 128, 3, dtype=torch.uint8)
    with Resident() as resident:
        for _ in tokenizer.encode_stream(chain(pieces, [last])):
            pass
    return resident.most
