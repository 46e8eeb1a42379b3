"""Settings of compare."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.settings import check_at_least_1

_CONFIGS = Path(__file__).parent.with_name("configs")


@dataclass(kw_only=True)
class Compare:
    """Compare pre-training objectives, or tokenizers, with an equal budget, several seeds and the same probe."""

    entries: list[str] = field(default_factory=list)
    """Settings files of pretrain_ar (YAML); each file is an entry of the same name. By default all files in configs/tiny."""
    cache: str | None = None
    """Token cache with labels; same values as --cache of pretrain_ar. Some objectives need cached pixels (--keep_pixels) or
    two views of each video. Without it, each entry uses the `cache` that its file names, else the newest one; the caches must
    have the same labelled videos. This compares tokenizers."""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    budget: Literal["steps", "clips", "seconds"] = "steps"
    """Unit of the budget of each training run: optimizer steps, clips, or wall time on this machine."""
    amount: int = 1000
    """Budget of each training run in steps, clips or seconds."""
    seeds: int = 5
    """Number of seeds. Each seed gives one training run and one untrained network per entry."""
    points: int = 4
    """Number of probes of each training run, including one at its end. A run of few steps may have fewer."""
    out: Path | None = None
    """Folder of the comparison; by default runs/compare-<hash of the settings>."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "amount", "seeds", "points")
        self.files = [Path(entry) for entry in self.entries] or sorted(_CONFIGS.glob("tiny/*.yaml"))
        names = [file.stem for file in self.files]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"entries must have different file names, got {duplicates[0]!r} twice")
