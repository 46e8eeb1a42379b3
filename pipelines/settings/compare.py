"""Settings of compare."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.settings import check_at_least_1

_CONFIGS = Path(__file__).parent.with_name("configs")


@dataclass(kw_only=True)
class Compare:
    """Compare pre-training objectives on one cache, with an equal budget, several seeds and the same probe."""

    entries: list[str] = field(default_factory=list)
    """Settings files of pretrain_ar to compare, each named by its file; by default those of configs/tiny."""
    cache: str | None = None
    """Token cache with labels, given as in pretrain_ar. Some objectives need cached pixels (--keep_pixels) or two views."""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    budget: Literal["steps", "clips", "seconds"] = "steps"
    """Budget that is the same for all training runs: optimizer steps, clips, or wall time on this machine."""
    amount: int = 1000
    """Steps, clips or seconds of each training."""
    seeds: int = 5
    """Number of seeds. Each seed gives one training run and one untrained network per entry."""
    points: int = 4
    """Number of probes during each training run, the last one at its end; fewer if the steps do not divide evenly."""
    out: Path | None = None
    """Folder of the comparison; by default runs/compare-<hash of the settings>."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "amount", "seeds", "points")
        self.files = [Path(entry) for entry in self.entries] or sorted(_CONFIGS.glob("tiny/*.yaml"))
        names = [file.stem for file in self.files]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"entries must have different file names, got {duplicates[0]!r} twice")
