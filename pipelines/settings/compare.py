"""Settings of compare."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_CONFIGS = Path(__file__).parent.with_name("configs")


@dataclass(kw_only=True)
class Compare:
    """Which objective, on these videos, for this budget: several objectives and seeds on one cache, probed alike."""

    entries: list[str] = field(
        default_factory=lambda: [],
        metadata={
            "help": "What is compared: settings files of pretrain_ar, called by their names; by default those of configs/tiny."
        },
    )
    cache: str | None = None
    """A labelled cache, as in pretrain_ar; pixels and two views or more where an objective needs them."""
    caches: Path = Path("caches")
    """Where caches live."""
    budget: Literal["steps", "clips", "seconds"] = "steps"
    """What is equal for all: optimizer steps, clips seen, or time on this machine."""
    amount: int = 1000
    """How many steps, clips or seconds each training has."""
    seeds: int = 5
    """Trainings of each, and untrained networks."""
    points: int = 4
    """Probes of each training, of models on the way and the last one; fewer where the steps are not divided evenly."""
    out: Path | None = None
    """Folder of the comparison; by default runs/compare-<hash of the settings>."""

    def __post_init__(self) -> None:
        for name in ("amount", "seeds", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        self.files = [Path(entry) for entry in self.entries] or sorted(_CONFIGS.glob("tiny/*.yaml"))
        names = [file.stem for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("entries: two files have the same name, which is what they are called by")
