"""Settings of probe."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.settings import check_at_least_1


@dataclass(kw_only=True)
class Probe:
    """Evaluate a frozen pre-trained model with probes, compared with the same probes on baselines without pre-training."""

    run: Path | None = None
    """Run folder of pretrain_ar; by default the newest finished one."""
    cache: str | None = None
    """Token cache with labels, made by the same tokenizer; by default the cache of the run."""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    seeds: int = 3
    """Number of repetitions, each with a new untrained network and new folds. With official splits there are no folds: each
    repetition trains on a different random 90 % of the training clips."""
    attentive: bool = False
    """Also train an attentive probe on the tokens of every layer. This takes minutes and stores all tokens in temporary files."""
    out: Path | None = None
    """Folder of the result; by default probe-<hash of the settings> in the run folder."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "seeds")
