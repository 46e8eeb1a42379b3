"""Probe a pre-trained model with frozen weights, and baselines without pre-training."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from ar_model.attentive import schedule
from ar_model.folds import Fold, chance
from ar_model.probes import ATTENTIVE, PROTOCOL, Outcomes
from data.cache import TokenCache, find_cache
from data.files import sha256_of, write_bytes
from data.schema import conform
from pipelines.engine.console import progress, say
from pipelines.engine.device import resolve_precision, start_accelerator
from pipelines.engine.run import Run
from pipelines.engine.run_files import cache_of, find_run, summary_of
from pipelines.engine.summaries import Pretraining
from pipelines.evaluation.baselines import baselines
from pipelines.evaluation.errors import accuracy_with_error, difference
from pipelines.evaluation.features import EVALUATION, LabelledVideos, probe_model, seen_in_pretraining
from pipelines.settings.probe import Probe


def main(config: Probe, settings: str) -> dict[str, Any]:
    """Probe a run, write the result into its folder, and return the result."""
    pretrained = find_run(config.run, "pretrain_ar")
    pretraining = conform(summary_of(pretrained), Pretraining, f"{pretrained}/summary.json")
    cache = TokenCache.open(find_cache(config.caches, config.cache or cache_of(pretrained)))
    if cache.spec["tokenizer"] != pretraining["tokenizer"]:
        raise ValueError(f"--cache {cache.address}: was made by another tokenizer than the cache of {pretrained}")
    about = sha256_of([cache.key, EVALUATION, PROTOCOL, ATTENTIVE])
    run = Run("probe", config, settings, about=about, parent=pretrained)
    accelerator = start_accelerator(resolve_precision("auto"))
    labelled = LabelledVideos.of(cache)
    repetitions = [labelled.folds(seed) for seed in range(config.seeds)]
    notes = [*labelled.notes, *labelled.unpredictable(repetitions)]
    for note in notes:
        say(accelerator, note)
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    # scikit-learn works in one process. The others end, because a wait has a time limit.
    if not accelerator.is_main_process:
        return {}
    with threadpool_limits(torch.get_num_threads()):
        results, trained_outcomes = _probe_all(accelerator, config, pretrained, cache, labelled, repetitions)
    file = run.folder / "predictions.csv"
    write_bytes(file, _predictions(cache, labelled, trained_outcomes).encode(errors="surrogateescape"))
    trained = _pretraining_cache(config, pretrained, cache)
    summary = {
        "run": str(pretrained),
        "cache": cache.address,
        "protocol": PROTOCOL + (f"; {ATTENTIVE}" if config.attentive else ""),
        "n": sum(len(fold.test) for fold in repetitions[0]),
        "in_pretraining": None if trained is None else seen_in_pretraining(cache, labelled, repetitions[0], trained),
        "folds": len(repetitions[0]),
        "seeds": config.seeds,
        "skipped": len(cache.manifest["skipped"]),
        "unlabelled": len(cache) - len(labelled.rows) - labelled.left_out,
        "left_out": labelled.left_out,
        "chance": round(chance(labelled.y_N, repetitions[0]), 4),
        "notes": notes,
        **results,
        "per_class": _per_class(labelled, trained_outcomes),
        "predictions": str(file),
    }
    return run.finish_alone(summary)


def _pretraining_cache(config: Probe, pretrained: Path, cache: TokenCache) -> TokenCache | None:
    """Return the cache that a network was pre-trained on, or None if it is not the probed cache and cannot be read."""
    if config.cache is None:
        return cache
    try:
        return TokenCache.open(find_cache(config.caches, cache_of(pretrained)))
    except (OSError, ValueError):
        return None


def _probe_all(
    accelerator: Accelerator,
    config: Probe,
    pretrained: Path,
    cache: TokenCache,
    labelled: LabelledVideos,
    repetitions: list[list[Fold]],
) -> tuple[dict[str, Any], list[Outcomes]]:
    """Return the accuracies of the model, of untrained networks and of pixel baselines, by their keys in the summary.

    The second value has the outcomes of the model.
    """
    # Clips are read by the model, the baselines and one untrained network per seed, and probed for two networks per seed.
    passes, clips = 3 * config.seeds + 2, len(labelled.rows)
    bar = progress(accelerator, clips * passes, f"{passes} passes over {clips:,} clips")
    probed = (accelerator, pretrained / "model", cache, labelled)
    trained = probe_model(*probed, repetitions, attentive=config.attentive, bar=bar)
    untrained = []
    for seed, folds in enumerate(repetitions):
        torch.manual_seed(seed)
        untrained += probe_model(*probed, [folds], trained=False, attentive=config.attentive, bar=bar)
    pixels = baselines(cache, labelled, repetitions, bar)
    bar.close()

    groups_M = labelled.groups_of(trained[0].tested)
    probes = list(trained[0].best)
    results: dict[str, Any] = {probe: _best(trained, probe, groups_M) for probe in probes}
    for probe in probes:
        results["untrained" if probe == "linear" else f"untrained_{probe}"] = _best(untrained, probe, groups_M)
    results["gain"] = {probe: _gain(trained, untrained, probe, groups_M, len(probes)) for probe in probes}
    results |= pixels
    results["layer"] = _layer(trained, "linear")
    results["layers"] = _layers(trained, "linear", groups_M)
    results["untrained_layers"] = _layers(untrained, "linear", groups_M)
    if config.attentive:
        results["attentive_layer"] = _layer(trained, "attentive")
        steps, epochs = schedule(len(set(np.concatenate([fold.train for fold in repetitions[0]]))))
        results["attentive_training"] = {"steps": steps, "epochs": round(epochs, 1)}
        results["attentive_layers"] = _layers(trained, "attentive", groups_M)
    return results, trained


def _per_class(labelled: LabelledVideos, repetitions: Sequence[Outcomes]) -> dict[str, dict[str, float | int]]:
    """Return for each class its number of tested videos, and the accuracy of each probe on them."""
    y_M = labelled.y_N[repetitions[0].tested]
    classes: dict[str, dict[str, float | int]] = {}
    for name in sorted(set(y_M)):
        of_class = y_M == name
        accuracies = {
            probe: round(float(np.mean([np.array(one.best[probe])[of_class] for one in repetitions])), 4)
            for probe in repetitions[0].best
        }
        classes[str(name)] = {"n": int(of_class.sum()), **accuracies}
    return classes


def _predictions(cache: TokenCache, labelled: LabelledVideos, repetitions: Sequence[Outcomes]) -> str:
    """Return a table with a row for each tested video: the predictions of each probe in the first repetition.

    The column `<probe>_right` has the share of the repetitions in which the prediction is right.
    """
    first, text = repetitions[0], io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    probes = list(first.best)
    writer.writerow(["path", "label", "group", *(name for probe in probes for name in (probe, f"{probe}_right"))])
    for number, sample in enumerate(first.tested):
        video = cache.videos[labelled.rows[sample]]
        cells: list[Any] = []
        for probe in probes:
            share = np.mean([one.best[probe][number] for one in repetitions])
            cells += [first.predicted[probe][number], f"{share:.3g}"]
        writer.writerow([video.path, video.label, video.group or "", *cells])
    return text.getvalue()


def _best(repetitions: Sequence[Outcomes], probe: str, groups_M: np.ndarray) -> dict[str, float | None]:
    """Return the mean accuracy at the chosen layers, with its error."""
    return accuracy_with_error([outcomes.best[probe] for outcomes in repetitions], groups_M)


def _gain(
    trained: Sequence[Outcomes], untrained: Sequence[Outcomes], probe: str, groups_M: np.ndarray, probes: int
) -> dict[str, Any]:
    """Return the difference in accuracy from the untrained networks. Each repetition has the same folds for both."""
    trained_RM, untrained_RM = ([one.best[probe] for one in outcomes] for outcomes in (trained, untrained))
    return difference(trained_RM, untrained_RM, groups_M, probes)


def _layer(repetitions: Sequence[Outcomes], probe: str) -> int:
    """Return the layer that most folds have chosen, counted from 1."""
    return Counter(layer for outcomes in repetitions for layer in outcomes.chosen[probe]).most_common(1)[0][0]


def _layers(repetitions: Sequence[Outcomes], probe: str, groups_M: np.ndarray) -> list[dict[str, float | None]]:
    """Return the mean accuracy of each layer with its error, from first to last."""
    layers = zip(*(outcomes.layers[probe] for outcomes in repetitions), strict=True)
    return [accuracy_with_error(layer, groups_M) for layer in layers]
