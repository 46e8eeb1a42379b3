"""Settings of evaluate."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.settings.training import Precision

_MAX_VIEWS = 100


@dataclass(kw_only=True)
class Evaluate:
    """Evaluate a fine-tuned classifier on labelled videos, with one or several views of each."""

    model: Path | None = None
    """Run folder of finetune, or a copy of its folder `model`; by default the newest finished run."""
    tokenizer: str | None = None
    """Place of the tokenizer, if it is neither in the folder of the model nor where it was."""
    trust: bool = False
    """Allow a tokenizer that contains code."""
    videos: str = "builtin:moving-digits"
    """Labelled videos: a folder with one sub-folder per class, a list file, or builtin:moving-digits."""
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    """Split that is evaluated; auto: test; val if no video has the split test; all videos if none has a split."""
    views: str = "1x1"
    """Clips x crops of each video: 5x3 takes 5 clips, evenly spread over the video, and 3 crops of each, evenly spread over the
    longer side. The probabilities of the classes are averaged."""
    precision: Precision = "fp32"
    """Precision of the model: fp32, bf16 (autocast), or auto: bf16 if the hardware supports it natively."""
    workers: int | None = None
    """Threads that decode the next videos; 0 decodes in the main thread. By default the cores of this process minus one."""
    out: Path | None = None
    """Folder of the results; by default runs/evaluate-<hash of the settings>."""

    def __post_init__(self) -> None:
        self.clips_and_crops()
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")

    def clips_and_crops(self) -> tuple[int, int]:
        """Return the numbers of clips and of crops. Raises a ValueError if they are invalid."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.views, re.ASCII)
        if match is None or int(match[1]) * int(match[2]) > _MAX_VIEWS:
            expected = f"clips x crops such as 5x3, at most {_MAX_VIEWS} views"
            raise ValueError(f"views must be {expected}, got {self.views}")
        return int(match[1]), int(match[2])
