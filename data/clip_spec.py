"""Settings for cutting clips from videos."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

MAX_FPS = 1000
MAX_SECONDS = 10**6
MIN_SCALE = 0.1
MAX_PIXELS = 2**27
"""Most pixels of a clip, counted in the square from which it is cropped: 402 MB."""
MAX_STRIDE = 2**20


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Settings for cutting clips from a video. Raises ValueError for a number out of range."""

    frames: int = 16
    """Frames of a clip. A shorter video is padded with its last frame; the padding is recorded."""
    size: int = 64
    """Side of the square crop in pixels. The short side of the video is resized to this size; the aspect ratio is kept."""
    stride: int = 1
    """Take every stride-th frame of the video."""
    views: int | Literal["dense"] = 1
    """Clips of each video. The first is cut from the middle; the others are drawn at random, seeded by the path. dense:
    consecutive clips that cover the whole video."""
    flip: bool = False
    """Flip all views except the first horizontally, each at random."""
    fps: float | None = None
    """Resample the video to this number of frames per second, before stride is applied. A frame is repeated or left out according
    to the time stamps. By default all frames are used."""
    seconds: float | None = None
    """Length of a clip in seconds, whatever the frame rate of the video: the same as fps with frames / seconds."""
    span: Literal["video"] | None = None
    """video: spread the frames of each clip over the whole video. Each view except the first is shifted in time by less than the
    distance of two frames. By default a clip is a part of the video."""
    scales: tuple[float, ...] | None = None
    """Crop each view except the first at a scale drawn from this list: 0.875 crops a square whose side is 0.875 of the video's
    short side, and resizes it to size. By default the side is the short side. Dense views are not scaled."""

    def __post_init__(self) -> None:
        for name in ("frames", "size", "stride", "views"):
            value = getattr(self, name)
            if value != "dense" and value < 1:
                raise ValueError(f"clip.{name} must be at least 1, got {value}")
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise ValueError(f"clip.fps must be above 0 and at most {MAX_FPS}, got {self.fps}")
        if self.seconds is not None and not self.frames / MAX_FPS <= self.seconds <= MAX_SECONDS:
            limits = f"at least {self.frames / MAX_FPS:g}, for {self.frames} frames, and at most {MAX_SECONDS}"
            raise ValueError(f"clip.seconds must be {limits}, got {self.seconds}")
        self._check_times()
        if self.scales is not None:
            # JSON and YAML have lists.
            object.__setattr__(self, "scales", tuple(self.scales))
            if not self.scales or not all(MIN_SCALE <= scale <= 1 for scale in self.scales):
                raise ValueError(f"clip.scales must be numbers from {MIN_SCALE} to 1, got {list(self.scales)}")
        if self.stride > MAX_STRIDE:
            raise ValueError(f"clip.stride must be at most {MAX_STRIDE}, got {self.stride}")
        # The clips of somebody else's cache are cut again, in memory.
        longest = max(self.frames, self.size)
        if longest > MAX_PIXELS or self.frames * (self.size / min(self.scales or (1,))) ** 2 > MAX_PIXELS:
            scaled = f" at scale {min(self.scales)}" if self.scales else ""
            sizes = f"{self.frames} frames of {self.size}x{self.size}{scaled}"
            raise ValueError(f"clip.frames and clip.size must give at most {MAX_PIXELS} pixels, got {sizes}")

    def _check_times(self) -> None:
        """Raise ValueError if two settings determine the times of frames."""
        if self.fps is not None and self.seconds is not None:
            raise ValueError(f"clip.seconds {self.seconds:g} and clip.fps {self.fps:g} exclude each other")
        if self.seconds is not None and self.stride != 1:
            raise ValueError(f"clip.seconds {self.seconds:g} needs clip.stride 1, got {self.stride}")
        if self.span is None:
            return
        if self.span != "video":
            raise ValueError(f"clip.span must be video or null, got {self.span!r}")
        others = {"fps": self.fps, "seconds": self.seconds, "stride": None if self.stride == 1 else self.stride}
        for name, value in {**others, "views": "dense" if self.views == "dense" else None}.items():
            if value is not None:
                raise ValueError(f"clip.span video and clip.{name} {value} exclude each other")

    @property
    def rate(self) -> float | None:
        """Frames per second to which videos are resampled, or None if all frames are used or spread over the video."""
        return self.frames / self.seconds if self.seconds is not None else self.fps

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON content, which `ClipSpec(**content)` reads.

        Settings without a value are left out, so that the keys of caches from before these settings stay.
        """
        return {name: value for name, value in asdict(self).items() if value is not None}
