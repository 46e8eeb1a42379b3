"""Encoding of clips to codes in batches of a fixed size, so that the codes of a video do not depend on other videos.

Legend: B clips of a batch, T H W C frames, height, width, channels, t h w grid of codes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from data.cache.earlier import EarlierCodes, EarlierVideo
from data.clip_spec import ClipSpec
from data.clips import ClipCuts, iter_clips
from data.decoding import DamagedVideo
from data.pixels import KeepPixels, pack_pixels
from data.sources import Source, Video
from tokenizer import VideoTokenizer


@dataclass(frozen=True)
class DecodedClip:
    """One view of a video: its pixels, and the shard member with the stored pixels (empty if none are stored)."""

    pixels_THWC: np.ndarray
    member: dict[str, bytes]


Decoded = DecodedClip | ClipCuts | DamagedVideo | EarlierVideo


def decode(
    source: Source, video: Video, clip: ClipSpec, keep: KeepPixels, earlier: EarlierCodes | None = None
) -> Iterator[Decoded]:
    """Yield the views of a video, then their cuts; or its codes, if an earlier cache has them.

    If the video is damaged, yield its DamagedVideo error and stop.
    """
    if earlier is not None and (found := earlier.read(video)) is not None:
        yield found
        return
    try:
        for view, item in enumerate(iter_clips(source, video, clip)):
            yield item if isinstance(item, ClipCuts) else DecodedClip(item, pack_pixels(keep, view, item))
    except DamagedVideo as damage:
        yield damage


@dataclass
class EncodedVideo:
    """A video and its codes, filled in while its clips pass through the tokenizer."""

    video: Video
    codes: list[np.ndarray] = field(default_factory=list)
    """Codes of each view, (t, h, w)."""
    pixels: dict[str, bytes] = field(default_factory=dict)
    """Shard members with stored pixels."""
    clips: int = 0
    """Number of decoded views."""
    end: ClipCuts | DamagedVideo | None = None
    """Cuts of the views, or the damage; None until the video is decoded."""

    @property
    def complete(self) -> bool:
        return isinstance(self.end, DamagedVideo) or (self.end is not None and len(self.codes) == self.clips)


class Encoder:
    """Encoder of clips in batches of exactly `batch` clips, on the device of the tokenizer; black clips fill the last batch.

    The codes of a clip do not depend on the other clips of its batch or on the number of processes. Therefore the encoder
    uses no TF32, no cuDNN benchmark, and one CPU thread, because sums depend on the number of threads. To use several cores,
    start several processes.
    """

    def __init__(self, tokenizer: VideoTokenizer, batch: int, precision: str) -> None:
        self._tokenizer, self._batch, self._precision = tokenizer, batch, precision
        weight = next(chain(tokenizer.parameters(), tokenizer.buffers()), None)
        self._device = torch.device("cpu") if weight is None else weight.device

    def clips(self, pixels_BTHWC: torch.Tensor) -> torch.Tensor:
        """Return the codes of any number of clips, int64 on the device of the tokenizer, the same as of `videos`."""
        parts = [part_BTHWC.cpu().numpy() for part_BTHWC in pixels_BTHWC.split(self._batch)]
        codes = [self._encode(self._filled(list(part)), self._precision)[: len(part)] for part in parts]
        return torch.from_numpy(np.concatenate(codes)).to(self._device)

    def videos(
        self,
        decoded: Iterable[tuple[Video, Iterator[Decoded]]],
        compare: Callable[[int, int], None] = lambda codes, mismatches: None,
    ) -> Iterator[EncodedVideo]:
        """Yield the videos with their codes, in order.

        In bf16, `compare` is called once, with the number of codes in the first batch and the number that differ from fp32.
        """
        waiting: deque[EncodedVideo] = deque()
        clips: list[tuple[EncodedVideo, np.ndarray]] = []
        first = True

        def encode() -> None:
            nonlocal first
            pixels_BTHWC = self._filled([pixels for _, pixels in clips])
            codes_Bthw = self._encode(pixels_BTHWC, self._precision)[: len(clips)]
            if first and self._precision != "fp32":
                exact_Bthw = self._encode(pixels_BTHWC, "fp32")[: len(clips)]
                compare(codes_Bthw.size, int((codes_Bthw != exact_Bthw).sum()))
            first = False
            for (owner, _), codes_thw in zip(clips, codes_Bthw, strict=True):
                owner.codes.append(codes_thw)
            clips.clear()

        for video, parts in decoded:
            owner = EncodedVideo(video)
            waiting.append(owner)
            for part in parts:
                if isinstance(part, EarlierVideo):
                    owner.codes, owner.clips, owner.end = list(part.codes_Vthw), len(part.codes_Vthw), part.cuts
                    owner.pixels.update(part.pixels)
                elif isinstance(part, DecodedClip):
                    owner.clips += 1
                    owner.pixels.update(part.member)
                    clips.append((owner, part.pixels_THWC))
                else:
                    owner.end = part
                if len(clips) == self._batch:
                    encode()
            while waiting and waiting[0].complete:
                yield waiting.popleft()
        if clips:
            encode()
        yield from waiting

    def _filled(self, clips: list[np.ndarray]) -> torch.Tensor:
        filled = np.zeros((self._batch, *clips[0].shape), np.uint8)
        np.stack(clips, out=filled[: len(clips)])
        return torch.from_numpy(filled).to(self._device)

    def _encode(self, pixels_BTHWC: torch.Tensor, precision: str) -> np.ndarray:
        with reproducible(), torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self._tokenizer.encode(pixels_BTHWC).cpu().numpy()


@contextmanager
def reproducible() -> Iterator[None]:
    """Context of reproducible forward passes, as far as the kernels allow; see Encoder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    exact_cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    matmul, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        with exact_cudnn:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.set_num_threads(threads)
