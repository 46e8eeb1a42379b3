"""What a tokenizer makes of clips: how well, in how many bits, how fast, in how much memory.

Legend: B clips, T H W C frames, height, width, colours.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenizer import VideoTokenizer
from tokenizer.base import to_float
from tokenizer.lpips import LPIPS
from tokenizer.measures import (
    VideoDetector,
    bits_per_pixel,
    code_health,
    flicker_of,
    frechet_distance,
    psnr_of,
    ssim_of,
)

_SECONDS = 1.0  # that a speed is measured for, at least


@dataclass(frozen=True)
class TokenizerScores:
    """What was measured, and the reconstructions, uint8."""

    numbers: dict[str, Any]
    video_BTHWC: Tensor


class TokenizerEvaluator:
    """The clips, and what they are judged by. Clips that are too short for a tokenizer go through it with their last frame
    repeated; what it makes of the repeated ones is not judged."""

    def __init__(
        self,
        pixels_BTHWC: Tensor,
        device: torch.device,
        *,
        batch_size: int,
        bf16: bool = False,
        lpips: LPIPS | None = None,
        detector: VideoDetector | None = None,
    ) -> None:
        self._pixels_BTHWC, self._device, self._batch_size, self._bf16 = pixels_BTHWC, device, batch_size, bf16
        self._lpips = None if lpips is None else lpips.to(device)
        self._detector = None if detector is None else detector.to(device)

    def judge(self, tokenizer: VideoTokenizer) -> TokenizerScores:
        """Put a tokenizer through the clips.

        Raises:
            ValueError: if it cannot take clips of this height and width, or a measure cannot.
        """
        clips, frames, height, width = self._pixels_BTHWC.shape[:4]
        taken = tokenizer.frames_that_fit(frames)
        grid = tokenizer.codes_shape(taken, height, width)
        repeated_BTHWC = self._pixels_BTHWC[:, -1:].expand(-1, taken - frames, -1, -1, -1)
        pixels_BTHWC = torch.cat([self._pixels_BTHWC, repeated_BTHWC], 1)
        tokenizer = tokenizer.to(self._device)
        codes, encode = self._timed(tokenizer.encode, pixels_BTHWC)
        videos, decode = self._timed(tokenizer.decode, codes)
        video_BTHWC = videos[:, :frames]
        codes_per_clip = grid[0] * grid[1] * grid[2]
        numbers = {
            "name": tokenizer.name,
            "frames": taken,
            **self._seen(video_BTHWC),
            **{key: value.item() for key, value in _health(codes, tokenizer.vocab_size).items()},
            "bits_per_pixel": bits_per_pixel(codes_per_clip, tokenizer.vocab_size, frames * height * width),
            "encode": clips * taken / encode,
            "decode": clips * taken / decode,
            "fingerprint": tokenizer.fingerprint(),
        }
        return TokenizerScores(numbers, video_BTHWC)

    def _seen(self, video_BTHWC: Tensor) -> dict[str, Any]:
        """What the eye sees, each as mean and standard error over clips."""
        seen_BTHWC = self._pixels_BTHWC
        found = {
            "psnr": psnr_of(seen_BTHWC, video_BTHWC),
            "ssim": ssim_of(seen_BTHWC, video_BTHWC),
            "flicker": flicker_of(seen_BTHWC, video_BTHWC),
        }
        if self._lpips is not None:
            found["lpips"] = torch.cat([self._distance(*pair) for pair in zip(seen_BTHWC, video_BTHWC, strict=True)])
        rfvd = None
        if self._detector is not None:
            a_ND, b_ND = (self._detector(x.to(self._device)) for x in (seen_BTHWC, video_BTHWC))
            rfvd = frechet_distance(a_ND, b_ND)
        return {"lpips": None, **{key: _with_error(value_B) for key, value_B in found.items()}, "rfvd": rfvd}

    @torch.no_grad()
    def _distance(self, pixels_THWC: Tensor, video_THWC: Tensor) -> Tensor:
        assert self._lpips is not None
        a, b = (rearrange(to_float(x.to(self._device)), "t h w c -> t c h w") for x in (pixels_THWC, video_THWC))
        return self._lpips(a, b).mean()[None].cpu()

    def _timed(self, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float]:
        """Results for all clips, and the seconds that they take: the fastest of rounds, after one that is not timed."""

        def once() -> Tensor:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                return torch.cat([function(part.to(self._device)) for part in x.split(self._batch_size)]).cpu()

        made = once()
        best, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < _SECONDS:
            start = time.perf_counter()
            once()
            best = min(best, time.perf_counter() - start)
        return made, best


def _health(codes: Tensor, vocab_size: int) -> dict[str, Tensor]:
    return code_health(torch.bincount(codes.flatten(), minlength=vocab_size))


def _with_error(value_B: Tensor) -> dict[str, float | None]:
    """Mean and standard error, which one clip does not have."""
    error = value_B.double().std().item() / len(value_B) ** 0.5 if len(value_B) > 1 else None
    return {"mean": value_B.double().mean().item(), "stderr": error}


_MEMORY = """
import sys
sys.path[0] = sys.argv[1]  # not the folder that one is in: what lies there may have the names of modules
import json
import torch
from pipelines.engine.memory import Resident
from tokenizer import load_tokenizer

source, trust, shape, device, bf16 = json.loads(sys.argv[2])
with Resident() as resident:
    tokenizer = load_tokenizer(source, trust=trust).to(device)
    pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        tokenizer.decode(tokenizer.encode(pixels))
print(torch.cuda.max_memory_allocated(device) if "cuda" in device else resident.most - resident.before)
"""


def memory_of(source: str, trust: bool, shape: Sequence[int], device: torch.device, bf16: bool) -> int:
    """The most bytes that a tokenizer, its weights included, takes to encode and decode a batch of this shape.

    In a process of its own, for memory that was used once makes what follows look small: resident bytes beyond those
    before it was loaded, or those of the GPU's allocator.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the other process
    arguments = json.dumps([source, trust, list(shape), str(device), bf16])
    command = [sys.executable, "-c", _MEMORY, str(Path(__file__).parents[2]), arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        why = (result.stderr.splitlines() or [f"exit code {result.returncode}"])[-1]
        raise ValueError(f"{source}: the memory of a batch cannot be measured: {why}")
    return int(result.stdout.splitlines()[-1])
