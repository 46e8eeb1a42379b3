"""Parts of videos, given by start and end in seconds.

A part has the path of its video with `#t=START,END` at its end, as in Media Fragments URI of the W3C.
"""

import math
import re
from dataclasses import dataclass

_SECONDS = r"\d{1,9}(?:\.\d{1,3})?"
_FRAGMENT = re.compile(rf"(.+)#t=({_SECONDS})?,({_SECONDS})?", re.DOTALL)
_MOST = 10**9


@dataclass(frozen=True)
class Segment:
    """Part of a video from `start` to `end`, in seconds from the first frame; None is the end of the video."""

    start: float
    end: float | None

    @classmethod
    def parse(cls, start: str, end: str) -> "Segment | None":
        """Read a part from two texts of a list; empty texts are the start and the end of the video. None is the whole video.

        Raises:
            ValueError: if a text is not a number of seconds, or the part is empty.
        """
        if not start.strip() and not end.strip():
            return None
        first = _seconds("start", start) if start.strip() else 0.0
        last = _seconds("end", end) if end.strip() else None
        if last is not None and last <= first:
            raise ValueError(f"end must be above start {_text(first)}, got {_text(last)}")
        return cls(first, last)

    def path(self, video: str) -> str:
        """Return the path of the part of a video."""
        return f"{video}#t={_text(self.start)},{'' if self.end is None else _text(self.end)}"


def split_path(path: str) -> tuple[str, Segment | None]:
    """Return the path of the video and the part, None for a path without `#t=`."""
    match = _FRAGMENT.fullmatch(path)
    if match is None or not (match[2] or match[3]):
        return path, None
    return match[1], Segment(float(match[2] or 0), float(match[3]) if match[3] else None)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < _MOST:
        raise ValueError(f"{name} must be a number of seconds, at least 0, got {text.strip()[:50]!r}")
    return round(value, 3)


def _text(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".")
