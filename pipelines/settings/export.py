"""Settings of export."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Export:
    """Write clips of a cache as mp4: their pixels beside what their codes decode to."""

    cache: str | None = None
    """Folder or address of a cache, or how its name or key begins; by default the newest in --caches."""
    caches: Path = Path("caches")
    """Folder of caches."""
    sample: list[str] = field(
        default_factory=list, metadata={"help": "Paths, ids or rows of videos; by default four of them."}
    )
    tokenizer: str | None = None
    """Tokenizer that decodes the codes; by default the one that made the cache."""
    trust: bool = False
    """Run the tokenizer if it is a program, as TorchScript is."""
    out: Path = Path("export")
    """Folder of the mp4 files."""
