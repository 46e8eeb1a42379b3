"""Settings of search."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.settings import check_at_least_1


@dataclass(kw_only=True)
class Search:
    """Find the videos with the most similar features, and write a page with moving pictures."""

    query: str = ""
    """Path of a video in the index of the features, number of a row of the index (from 0, over all shards), or a video file:
    its features are computed by the model of the others."""
    features: Path | None = None
    """Folder of features, written by extract_features with --pool clip or slices; by default the newest finished one."""
    k: int = 10
    """Number of nearest videos. Each is shown by its nearest window."""
    tokenizer: str | None = None
    """Place of the tokenizer, if it is neither in the folder of the model nor where it was. For a query from a file."""
    trust: bool = False
    """Allow a tokenizer that contains code, such as TorchScript."""
    out: Path | None = None
    """Folder of the page; by default runs/search-<hash of the settings>."""

    def __post_init__(self) -> None:
        check_at_least_1(self, "k")
        if not self.query:
            raise ValueError("query must name a video of the index, a row or a video file")
