"""Long videos: the codes of a stream beside those of one pass, and the memory that a stream takes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from data.clips import ClipSpec
from data.source_clips import held_out_clips
from data.sources import Source
from pipelines.benchmarks import Row
from pipelines.engine.encoding import reproducible
from tokenizer import VQ3D

_ROOT = Path(__file__).parent.parent.parent
_NAMES = ("vq3d-causal-4x8x8-fsq4375", "vq3d-small-causal-4x8x8-fsq4375", "vq3d-2x8x8-fsq1000")
_STREAM = """
import sys
from itertools import chain
import torch
from pipelines.engine.memory import Resident
from tokenizer import VQ3D

frames = int(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(1)
tokenizer = VQ3D(name="vq3d-causal-4x8x8-fsq4375").eval()
pieces = (torch.randint(256, (1, 10, 128, 128, 3), dtype=torch.uint8) for _ in range(frames // 10))
last = torch.zeros(1, 1, 128, 128, 3, dtype=torch.uint8)
with Resident() as resident:
    for codes in tokenizer.encode_stream(chain(pieces, [last])):
        pass
print(resident.most)
"""


def measure(source: Source, clip: ClipSpec, device: torch.device) -> Iterator[Row]:
    """1,000 frames: real clips, one after the other, with random weights."""
    clips_NTHWC = held_out_clips(source, clip, 96, {})
    video_BTHWC = clips_NTHWC.flatten(0, 1).repeat(1 + 1001 // (len(clips_NTHWC) * clips_NTHWC.shape[1]), 1, 1, 1)[None]
    for name in _NAMES:
        torch.manual_seed(0)
        tokenizer = VQ3D(name=name).eval().to(device)
        pixels_BTHWC = video_BTHWC[:, : 1001 if tokenizer.causal else 1000].to(device)
        with reproducible(), torch.no_grad():
            differ = (tokenizer.encode(pixels_BTHWC) != tokenizer.encode_piece(pixels_BTHWC)).sum().item()
        what = f"codes of {pixels_BTHWC.shape[1]:,} frames that differ between a stream and one pass, {name}"
        yield Row(what=what, unit="codes", ours=float(differ), reach="0")
    short, long = (median(_most_memory(frames) for _ in range(3)) for frames in (100, 1000))
    yield Row(
        what="memory to encode a stream of 1,000 frames of 128x128, the whole process",
        unit="MiB",
        ours=long / 2**20,
        peer=short / 2**20,
        alternative="100 frames",
        ratio=long / short,
        reach="≤ 1.1",
    )


def _most_memory(frames: int) -> int:
    command = [sys.executable, "-c", _STREAM, str(frames)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    return int(json.loads(result.stdout.splitlines()[-1]))
