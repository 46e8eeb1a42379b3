"""Frozen evaluation of a pre-trained model, beside the same probe on baselines that know nothing of pre-training."""

if not __package__:  # started as a file: put the repository first, not pipelines/, whose tokenize.py hides Python's own
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from ar_model.objectives import load_objective
from ar_model.probes import ATTENTIVE, PROTOCOL, Accuracy, Fold, chance, evaluate, with_error
from data.cache import TokenCache, find_cache
from pipelines.features import Labelled, collect
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
    attentive: bool = False
    """Also train an attentive probe on every layer's tokens; takes minutes, and disk space for all tokens meanwhile."""
    out: Path | None = None
    """Folder of the result; by default probe-<hash of the settings> in the run folder."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}, but must be at least 1")


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
        "protocol": PROTOCOL + (f"; {ATTENTIVE}" if config.attentive else ""),
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
    bar = progress(accelerator, len(labelled.rows) * (3 * config.seeds + 2), "clips read and probed")

    def frozen(trained: bool, cuts: Sequence[list[Fold]]) -> list[Accuracy]:
        model = load_objective(pretrained / "model", trained=trained)
        with TemporaryDirectory(prefix="arvideo-probe-") as folder:
            tokens = Path(folder) if config.attentive else None
            features = collect(accelerator, model, cache, labelled.rows, bar, tokens)
            found = []
            for cut in cuts:
                found.append(features.probe(labelled.y_N, cut, accelerator.device))
                bar.update(len(labelled.rows))
            return found

    trained = frozen(True, folds)
    untrained = []
    for seed in range(config.seeds):
        torch.manual_seed(seed)
        untrained += frozen(False, [folds[seed]])
    beside = baselines(cache, labelled, folds, bar)
    bar.close()

    def stated(found: Sequence[Accuracy], probe: str = "linear") -> dict[str, float]:
        return with_error([accuracy.best[probe] for accuracy in found], tested)

    others = [probe for probe in trained[0].best if probe != "linear"]
    return {
        **{probe: stated(trained, probe) for probe in trained[0].best},
        "untrained": stated(untrained),
        **{f"untrained_{probe}": stated(untrained, probe) for probe in others},
        **beside,
        "layer": Counter(layer for a in trained for layer in a.chosen).most_common(1)[0][0],
        "layers": layers_with_error(trained, "linear", tested),
        "untrained_layers": layers_with_error(untrained, "linear", tested),
        **({"attentive_layers": layers_with_error(trained, "attentive", tested)} if config.attentive else {}),
    }


def layers_with_error(found: Sequence[Accuracy], probe: str, tested: int) -> list[dict[str, float]]:
    """Accuracy of each layer, first to last."""
    return [with_error(layer, tested) for layer in zip(*(a.layers[probe] for a in found), strict=True)]


def baselines(cache: TokenCache, labelled: Labelled, folds: Sequence[list[Fold]], bar: Any) -> dict[str, Any]:
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


if __name__ == "__main__":
    command(Probe, main)
