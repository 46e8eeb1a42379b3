"""Videos for the GPU check: the user's folder, or generated files."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from data.moving_digits import CLASSES, render
from pipelines.gpu.part import Setting

_COUNT, _SIDE, _LOOPS = 96, 256, 2
"""Generated videos: their number, their height and width, and how often the 32 frames of a built-in video are repeated."""


def videos_folder(setting: Setting) -> Path:
    """Return the folder of videos, one sub-folder per class; without --videos write moving digits as H.264 files, once."""
    if setting.videos is not None:
        return setting.videos
    folder = setting.work / "videos"
    count, scale, loops = (16, 1, 1) if setting.dry else (_COUNT, _SIDE // 64, _LOOPS)

    def make(index: int) -> None:
        path, temporary = folder / CLASSES[index % len(CLASSES)] / f"{index:04d}.mp4", setting.work / f"{index:04d}.mp4"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary, np.tile(render(0, "train", index).repeat(scale, 1).repeat(scale, 2), (loops, 1, 1, 1)))
            # A part that is stopped leaves no half video.
            os.replace(temporary, path)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(make, range(count)))
    return folder


def _write(path: Path, frames_THWC: np.ndarray) -> None:
    """Write frames, uint8, as an H.264 file of 25 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
