"""Settings of export."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Export:
    """Write clips of a token cache as mp4: the original pixels next to the decoded codes."""

    cache: str | None = None
    """Folder or address of a token cache, or a prefix of its name or key; by default the newest in --caches."""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    sample: list[str] = field(default_factory=list)
    """Paths, ids or row numbers of videos; by default four videos of the cache."""
    tokenizer: str | None = None
    """Tokenizer that decodes the codes; by default the tokenizer that made the cache."""
    trust: bool = False
    """Allow a tokenizer that contains code, such as TorchScript."""
    out: Path | None = None
    """Folder of the mp4 files; by default export/<name of the cache>."""
