"""Frozen evaluation of a pre-trained model, beside the same probe on baselines that know nothing of pre-training."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from ar_model.objectives import load_objective
from ar_model.probes import ATTENTIVE, PROTOCOL, Accuracy, Fold, chance
from data.cache import TokenCache, find_cache
from pipelines.engine.console import progress, say
from pipelines.engine.device import resolve_precision, start_accelerator
from pipelines.engine.run import Run, find_run, summary_of
from pipelines.evaluation.baselines import baselines
from pipelines.evaluation.errors import with_error
from pipelines.evaluation.features import LabelledVideos, collect
from pipelines.settings.probe import Probe


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
    labelled = LabelledVideos.of(cache)
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
    labelled: LabelledVideos,
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
