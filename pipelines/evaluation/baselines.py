"""Probes of features that need no network: one frame, and motion energy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ar_model.probes import Fold, evaluate
from data.cache import TokenCache
from data.source_clips import canonical_clips
from pipelines.evaluation.errors import with_error
from pipelines.evaluation.features import LabelledVideos


def baselines(cache: TokenCache, labelled: LabelledVideos, folds: Sequence[list[Fold]], bar: Any) -> dict[str, Any]:
    """Linear probes of what needs no network: one frame, and where the pictures move."""
    tested = sum(len(fold.test) for fold in folds[0])
    said = {}
    for name, x_NF in zip(("one_frame", "motion_energy"), _pixel_baselines(cache, labelled.rows, bar), strict=True):
        found = [evaluate([x_NF], labelled.y_N, cut) for cut in folds]
        said[name] = with_error([accuracy.best["linear"] for accuracy in found], tested)
    return said


def _pixel_baselines(cache: TokenCache, rows: Sequence[int], bar: Any) -> tuple[np.ndarray, np.ndarray]:
    """The middle frame in 16x16 colours, and the mean absolute difference between frames in 16x16 greys, (N, F) each."""
    frames, energies = [], []
    for clip_THWC in canonical_clips(cache, rows):
        small_THWC = torch.nn.functional.adaptive_avg_pool2d(
            torch.from_numpy(clip_THWC.copy()).float().permute(0, 3, 1, 2), 16
        )
        frames.append(small_THWC[len(small_THWC) // 2].flatten().numpy())
        energies.append(
            small_THWC.mean(1).diff(dim=0).abs().mean(0).flatten().numpy()
            if len(small_THWC) > 1
            else np.zeros(256, np.float32)
        )
        bar.update()
    return np.stack(frames), np.stack(energies)
