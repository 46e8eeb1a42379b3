"""Times at which the frames of a video are displayed, and the frames that another frame rate displays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST = 10**7
"""Maximum number of frames at another rate: 92 hours at 30 frames per second. False time stamps could ask for any number."""
_ROUNDED = 0.001
"""Seconds by which a time stamp may be late. Some formats round it to milliseconds."""


@dataclass(frozen=True)
class Timing:
    """Number of frames of a video, its average frames per second, and the time stamp of each frame in seconds.

    `rate` is None if it is unknown. `stamps_T` is empty if the time stamps are unknown, and has None for a single unknown one.
    `last` is the time in seconds for which the last frame is displayed, 0 if it is unknown.
    """

    total: int
    rate: float | None
    stamps_T: Sequence[float | None] = ()
    last: float = 0.0

    def seconds(self) -> np.ndarray | None:
        """Return the seconds from the first frame to each frame, (total,), or None if there are neither time stamps nor a rate.

        The average rate is used if a time stamp is unknown or the time stamps are not in the order of the frames.
        """
        if self._in_order():
            stamps_T = np.array(self.stamps_T, dtype=np.float64)
            return stamps_T - stamps_T[0]
        return np.arange(self.total) / self.rate if self.rate else None

    def _in_order(self) -> bool:
        stamps_T = np.array(self.stamps_T, dtype=np.float64)
        ordered = len(stamps_T) == self.total and np.isfinite(stamps_T).all() and (np.diff(stamps_T) >= 0).all()
        return bool(ordered and (self.total == 1 or stamps_T[-1] > stamps_T[0]))

    def part(self, start: float, end: float | None) -> tuple["Timing", int]:
        """Return the timing of the frames from `start` to `end` seconds, and the number of the first of them.

        The frame that is on display at `start` is the first. None is the end of the video.

        Raises:
            ValueError: if the times of the frames are unknown, or the video ends before `start`.
        """
        seconds_T, duration = self._seconds_and_end()
        if seconds_T is None:
            raise ValueError("has neither time stamps nor a frame rate, which start and end need")
        if start >= duration:
            raise ValueError(f"ends at {duration:.3f} s, before the start of the part at {start:g} s")
        first = max(0, int(np.searchsorted(seconds_T, start + _ROUNDED, side="right")) - 1)
        after = self.total if end is None else int(np.searchsorted(seconds_T, end - _ROUNDED, side="left"))
        after = max(first + 1, after)
        stamps_T = self.stamps_T[first:after] if len(self.stamps_T) == self.total else ()
        last = self.last if after == self.total else float(seconds_T[after] - seconds_T[after - 1])
        return Timing(after - first, self.rate, stamps_T, last), first

    def spread(self, count: int, shift: float) -> np.ndarray:
        """Return the number of the frame on display at `count` times that divide the video evenly, (count,).

        The first time is `shift` of a part after the start, 0 to 1. If times are unknown or false, all frames last equally long.
        """
        part_T = (np.arange(count) + shift) / count
        seconds_T, end = self._seconds_and_end()
        if seconds_T is None or not 0 < end < np.inf:
            return np.minimum((part_T * self.total).astype(np.int64), self.total - 1)
        return np.searchsorted(seconds_T, part_T * end, side="right") - 1

    def rate_of(self, count: int) -> float | None:
        """Return the frames per second of `count` frames spread over the video, or None if its duration is unknown."""
        _, end = self._seconds_and_end()
        return count / end if 0 < end < np.inf else None

    def resampled(self, fps: float) -> np.ndarray:
        """Return the number of the frame on display at each time 0, 1 / fps, 2 / fps, ... until the end, (T,).

        A frame appears several times if `fps` is above the rate of the video. Raises ValueError if the times of the frames are
        unknown or false.
        """
        seconds_T, end = self._seconds_and_end()
        if seconds_T is None:
            raise ValueError("has neither time stamps nor a frame rate, which clip.fps needs")
        if not end * fps < _MOST:
            raise ValueError(f"has time stamps that span {end:.0f} seconds, too many for clip.fps {fps:g}")
        count = max(1, int(np.ceil((end - _ROUNDED) * fps)))
        return np.searchsorted(seconds_T, np.arange(count) / fps + _ROUNDED, side="right") - 1

    def _seconds_and_end(self) -> tuple[np.ndarray | None, float]:
        """Return the times of the frames in seconds, (total,), and of the end of the last one; None and 0 if they are unknown.

        A last frame of unknown duration is displayed as long as the one before it, as in the ffmpeg program.
        """
        seconds_T = self.seconds() if self.total <= _MOST else None
        if seconds_T is None:
            return None, 0.0
        last = self.last if self._in_order() and self.last > 0 else seconds_T[-1] - seconds_T[-min(2, self.total)]
        return seconds_T, float(seconds_T[-1] + last)
