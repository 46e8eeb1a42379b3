"""Settings of probe."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Probe:
    """Frozen evaluation of a pre-trained model, beside the same probe on baselines that know nothing of pre-training."""

    run: Path | None = None
    """Run folder of pretrain_ar; by default the newest finished one."""
    cache: str | None = None
    """Labelled cache to probe on, made by the same tokenizer; by default the one of the run."""
    caches: Path = Path("caches")
    """Where caches live."""
    seeds: int = 3
    """Repetitions, each with other folds (or another nine tenths of the training clips) and another untrained network."""
    attentive: bool = False
    """Also train an attentive probe on every layer's tokens; takes minutes, and disk space for all tokens meanwhile."""
    out: Path | None = None
    """Folder of the result; by default probe-<hash of the settings> in the run folder."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}, but must be at least 1")
