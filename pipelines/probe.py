"""Frozen evaluation of a pre-trained model, beside the same probe on baselines that know nothing of pre-training."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from ar_model.objectives import Objective, load_objective
from ar_model.probes import PROTOCOL, Accuracy, Fold, chance, evaluate, make_folds, slice_means, with_error
from data.cache import TokenCache, find_cache
from data.loading import evaluation_batches
from pipelines.run import Run, command, find_run, progress, say, start_accelerator, summary_of
from pipelines.source_clips import canonical_clips
from pipelines.training import resolve_precision


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
    out: Path | None = None
    """Folder of the result; by default probe-<hash of the settings> in the run folder."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}, but must be at least 1")


@dataclass(frozen=True)
class Labelled:
    """The labelled videos of a cache."""

    rows: list[int]
    y_N: np.ndarray
    groups: list[str | None]
    held_out_N: np.ndarray

    @classmethod
    def of(cls, cache: TokenCache) -> "Labelled":
        rows = [row for row, video in enumerate(cache.videos) if video.label is not None]
        videos = [cache.videos[row] for row in rows]
        y_N = np.array([video.label for video in videos])
        if len(set(y_N)) < 2:
            raise ValueError(f"{cache.address}: {len(set(y_N))} classes among its labels; a probe needs two or more")
        held_out = np.array([video.split not in (None, "train") for video in videos])
        return cls(rows, y_N, [video.group for video in videos], held_out)

    def folds(self, seed: int) -> list[Fold]:
        return make_folds(self.y_N, self.groups, self.held_out_N, seed)


def main(config: Probe, settings: str) -> dict[str, Any]:
    pretrained = find_run(config.run, "pretrain_ar")
    trained = summary_of(pretrained)
    cache = TokenCache.open(find_cache(config.caches, config.cache or trained["cache"]))
    if cache.spec["tokenizer"] != trained["tokenizer"]:
        raise ValueError(
            f"--cache {cache.address}: was made by another tokenizer than that of {pretrained}; its codes mean other things"
        )
    run = Run("probe", config, settings, about=cache.key, parent=pretrained)
    accelerator = start_accelerator(resolve_precision("auto"))
    labelled = Labelled.of(cache)
    folds = [labelled.folds(seed) for seed in range(config.seeds)]
    run.begin(accelerator)
    if run.finished:
        say(accelerator, f"{run.folder} is finished: nothing is left to do")
        return run.summary()
    if not accelerator.is_main_process:  # scikit-learn works in one process
        accelerator.wait_for_everyone()
        return {}
    with threadpool_limits(torch.get_num_threads()):
        results = _probe_all(accelerator, config, pretrained, cache, labelled, folds)
    summary = {
        "run": str(pretrained),
        "cache": cache.address,
        "protocol": PROTOCOL,
        "n": sum(len(fold.test) for fold in folds[0]),
        "folds": len(folds[0]),
        "seeds": config.seeds,
        "skipped": len(cache.manifest["skipped"]),
        "unlabelled": len(cache) - len(labelled.rows),
        "chance": round(chance(labelled.y_N, folds[0]), 4),
        **results,
    }
    return run.finish(accelerator, summary)


def _probe_all(
    accelerator: Accelerator,
    config: Probe,
    pretrained: Path,
    cache: TokenCache,
    labelled: Labelled,
    folds: list[list[Fold]],
) -> dict[str, Any]:
    """The accuracies of the model and of its baselines, as the summary gives them."""
    tested = sum(len(fold.test) for fold in folds[0])
    bar = progress(accelerator, len(labelled.rows) * (config.seeds + 2), "probe")

    def repeat(layers_NF: list[np.ndarray]) -> list[Accuracy]:
        return [evaluate(layers_NF, labelled.y_N, cut) for cut in folds]

    trained = repeat(pooled_features(accelerator, load_objective(pretrained / "model"), cache, labelled.rows, bar))
    untrained = []
    for seed in range(config.seeds):
        torch.manual_seed(seed)
        fresh = load_objective(pretrained / "model", trained=False)
        untrained.append(
            evaluate(pooled_features(accelerator, fresh, cache, labelled.rows, bar), labelled.y_N, folds[seed])
        )
    frame_NF, energy_NF = _pixel_baselines(cache, labelled.rows, bar)
    bar.close()
    return {
        "linear": with_error([a.linear for a in trained], tested),
        "knn": with_error([a.knn for a in trained], tested),
        "untrained": with_error([a.linear for a in untrained], tested),
        "untrained_knn": with_error([a.knn for a in untrained], tested),
        "one_frame": with_error([a.linear for a in repeat([frame_NF])], tested),
        "motion_energy": with_error([a.linear for a in repeat([energy_NF])], tested),
        "layer": Counter(layer for a in trained for layer in a.chosen).most_common(1)[0][0],
        "layers": [with_error([a.layers[i] for a in trained], tested) for i in range(len(trained[0].layers))],
        "untrained_layers": [
            with_error([a.layers[i] for a in untrained], tested) for i in range(len(untrained[0].layers))
        ],
    }


@torch.inference_mode()
def pooled_features(
    accelerator: Accelerator, objective: Objective, cache: TokenCache, rows: Sequence[int], bar: Any
) -> list[np.ndarray]:
    """Pooled features of the canonical views, one (N, F) per layer."""
    objective.to(accelerator.device)
    pooled: list[list[np.ndarray]] = []
    for batch in evaluation_batches(cache, rows, batch_size=32, pixels=objective.sees_pixels):
        with accelerator.autocast():
            layers = objective.features({key: value.to(accelerator.device) for key, value in batch.items()})
        slices = objective.time_slices(batch)
        pooled.append([slice_means(layer, slices).cpu().numpy() for layer in layers])
        bar.update(len(batch["row_B"]))
    return [np.concatenate(parts) for parts in zip(*pooled, strict=True)]


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


if __name__ == "__main__":
    command(Probe, main)
