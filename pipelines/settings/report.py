"""Settings of report."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Report:
    """Write one self-contained HTML page about a run: tokenizer, cache, pre-training, probe, skipped videos, commands."""

    run: Path | None = None
    """Run folder of pretrain_ar; by default the newest finished one."""
    out: Path | None = None
    """Folder of the page; by default report in the run folder."""
    trust: bool = False
    """Allow a tokenizer that contains code, such as TorchScript."""
