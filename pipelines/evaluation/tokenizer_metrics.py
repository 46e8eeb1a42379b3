"""Quality, bit rate and throughput of tokenizers on a set of clips.

Legend: B clips, T H W C frames, height, width, channels, N samples, D features.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pipelines.evaluation.errors import mean_over_clips
from tokenizer import VideoTokenizer, measures
from tokenizer.base import to_float
from tokenizer.lpips import LPIPS
from tokenizer.measures import VideoDetector

_SECONDS = 1.0
"""Minimum duration of a speed measurement."""


@dataclass(frozen=True)
class TokenizerScores:
    """Metrics of a tokenizer, and its reconstructions (uint8)."""

    numbers: dict[str, Any]
    video_BTHWC: Tensor


class TokenizerEvaluator:
    """Evaluate tokenizers on the same clips.

    Clips that are too short for a tokenizer are padded with their last frame. The padding is not scored.

    Args:
        pixels_BTHWC: clips, uint8.
        bf16: run the tokenizers under bf16 autocast.
        lpips: adds the perceptual distance LPIPS.
        detector: feature network that adds rFVD.
    """

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

    def evaluate(self, tokenizer: VideoTokenizer) -> TokenizerScores:
        """Encode and decode all clips.

        Raises:
            ValueError: if the tokenizer or a metric does not accept clips of this height and width.
        """
        clips, frames, height, width = self._pixels_BTHWC.shape[:4]
        padded_frames = tokenizer.frames_that_fit(frames)
        t, h, w = tokenizer.codes_shape(padded_frames, height, width)
        padding_BTHWC = self._pixels_BTHWC[:, -1:].expand(-1, padded_frames - frames, -1, -1, -1)
        padded_BTHWC = torch.cat([self._pixels_BTHWC, padding_BTHWC], 1)
        tokenizer = tokenizer.to(self._device)
        codes, encode_seconds = self._timed(tokenizer.encode, padded_BTHWC)
        decoded_BTHWC, decode_seconds = self._timed(tokenizer.decode, codes)
        video_BTHWC = decoded_BTHWC[:, :frames]
        health = measures.code_health(measures.count_codes(codes, tokenizer.vocabularies))
        numbers = {
            "name": tokenizer.name,
            "frames": padded_frames,
            **self._quality(video_BTHWC),
            **{key: value.item() for key, value in health.items()},
            "bits_per_pixel": measures.bits_per_pixel(t * h * w, tokenizer.vocabularies, frames * height * width),
            "encode": clips * padded_frames / encode_seconds,
            "decode": clips * padded_frames / decode_seconds,
            "fingerprint": tokenizer.fingerprint(),
        }
        return TokenizerScores(numbers, video_BTHWC)

    @torch.no_grad()
    def _quality(self, video_BTHWC: Tensor) -> dict[str, Any]:
        """Return the mean and standard error over clips of each metric of the reconstructions, and their rFVD."""
        pixels_BTHWC = self._pixels_BTHWC
        scores: dict[str, Any] = {
            "lpips": None,
            "psnr": mean_over_clips(measures.psnr_of(pixels_BTHWC, video_BTHWC)),
            "ssim": mean_over_clips(measures.ssim_of(pixels_BTHWC, video_BTHWC)),
            "flicker": mean_over_clips(measures.flicker_of(pixels_BTHWC, video_BTHWC)),
            "rfvd": None,
        }
        if self._lpips is not None:
            distances = []
            for pair in zip(pixels_BTHWC, video_BTHWC, strict=True):
                a, b = (rearrange(to_float(x.to(self._device)), "t h w c -> t c h w") for x in pair)
                distances.append(self._lpips(a, b).mean().cpu())
            scores["lpips"] = mean_over_clips(torch.stack(distances))
        if self._detector is not None:
            a_ND, b_ND = (self._detector(x.to(self._device)) for x in (pixels_BTHWC, video_BTHWC))
            scores["rfvd"] = measures.frechet_distance(a_ND, b_ND)
        return scores

    def _timed(self, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float]:
        """Apply a function to all clips in batches. Return the result and the seconds of the fastest round after a warm-up."""

        def run() -> Tensor:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                return torch.cat([function(part.to(self._device)) for part in x.split(self._batch_size)]).cpu()

        result = run()
        fastest, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < _SECONDS:
            start = time.perf_counter()
            run()
            fastest = min(fastest, time.perf_counter() - start)
        return result, fastest
