"""Folders of features as extract_features writes them, without a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.inference.feature_files import FeatureFolder, Row


def window(path: str, label: str | None = None, group: str | None = None, view: int = 0) -> Row:
    return Row(path, label, group, None, view, 2.0 * view, 2.0 * view + 2)


def at_angles(*degrees: float) -> np.ndarray:
    """Features (N, 2) whose cosine similarity is the cosine of the difference of their angles."""
    radians = np.deg2rad(np.array(degrees, np.float32))
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def write_features(
    folder: Path, features_NF: np.ndarray, rows: Sequence[Row], shard_size: int = 3, **summary: Any
) -> FeatureFolder:
    """Write a finished folder. `summary` replaces fields of its summary.json."""
    written = FeatureFolder(folder)
    starts = range(0, len(rows), shard_size)
    for shard, first in enumerate(starts):
        written.write(shard, list(features_NF[first : first + shard_size]), list(rows[first : first + shard_size]), {})
    written.finish(len(starts))
    (folder / "environment.json").write_text(json.dumps({"pipeline": "extract_features"}))
    recorded = {
        "model": str(folder / "no model"),
        "weights": "0",
        "source": "builtin:moving-digits:8:0",
        "cache": None,
        "clip": {"frames": 4, "size": 64, "views": 2},
        "windows": len(rows),
        "shape": list(features_NF.shape[1:]),
        "layer": 1,
        "pool": "clip",
        "precision": "fp32",
    }
    (folder / "summary.json").write_text(json.dumps(recorded | summary))
    return written
