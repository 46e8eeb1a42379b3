"""HTML page of a search: the query, its nearest videos as moving pictures, and how well labels are found."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from data.decoding import DamagedVideo
from pipelines.engine.summaries import Extraction
from pipelines.reporting.pages import write_page
from pipelines.reporting.thumbnails import moving_picture

PICTURE_BYTES = 600_000
"""Most bytes of all moving pictures of a page."""
Cut = Callable[[], np.ndarray]
"""Cuts a clip again, uint8 (T, H, W, 3)."""


def write_search_page(page: Path, summary: Mapping[str, Any], extraction: Extraction, cuts: Sequence[Cut]) -> Path:
    """Write the page of a search, and return its path.

    Args:
        summary: summary of the search.
        cuts: cut the clip of the query and of each of the nearest windows. One whose video is gone has a note in its place.
    """
    left = PICTURE_BYTES
    cards = []
    for found, cut in zip([summary["query"], *summary["nearest"]], cuts, strict=True):
        card = dict(found) | {"picture": None, "note": "no picture: the page is large enough"}
        if left > 0:
            try:
                known = found["start"] is not None
                card["picture"] = moving_picture(cut(), found["end"] - found["start"] if known else None)
                left -= len(card["picture"])
            except (OSError, ValueError, IndexError, DamagedVideo) as error:
                card["note"] = f"no picture: {error}"
        cards.append(card)
    recall = summary["index"]["recall"]
    vectors = "all compared" if recall is None else f"faiss index, which finds {recall:.1%} of the ten nearest windows"
    features = {
        "folder": summary["features"],
        "model": extraction["model"],
        "layer": extraction["layer"],
        "pooling": extraction["pool"],
        "windows": f"{summary['windows']:,} of {summary['videos']:,} videos",
        "vectors": vectors,
    }
    values = {
        "title": f"Nearest to {PurePath(summary['query']['path']).name}",
        "query": cards[0],
        "nearest": cards[1:],
        "features": list(features.items()),
        # A stored evaluation is sorted by text: 1, 10, 5.
        "recall": sorted((summary["recall"] or {}).items(), key=lambda item: int(item[0])),
        "summary": summary,
    }
    return write_page(page, "search.html", values)
