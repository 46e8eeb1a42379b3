"""HTML page about a pre-training run: probe, training curves, orders, tokenizer, cache, skipped videos and commands."""

import base64
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from ar_model.clusters import cluster_order
from ar_model.folds import folds_in_words
from ar_model.objectives import ARVideo, load_objective
from data.cache import TokenCache
from data.loading import evaluation_batches
from data.schema import conform
from data.source_clips import canonical_clips
from data.sources import hold_out
from pipelines.engine.bit_rate import bits_per_second, fixed_bits
from pipelines.engine.recorded_tokenizer import load_recorded_tokenizer, recorded_tokenizer
from pipelines.engine.run_files import RUNS, cache_of, metrics_of, read_json
from pipelines.engine.summaries import Environment, OfACache, Pretraining, Probing, TokenizerTraining
from pipelines.evaluation.collapse import collapse_warning
from pipelines.inference.snippet import features_snippet
from pipelines.reporting.pages import mean_with_error, pretraining_in_words, write_page
from pipelines.reporting.pictures import bar_chart, line_chart, rank_maps, reconstruction_grid, to_png

_SAMPLES = 4
"""Videos in the picture of reconstructions, and samples in the maps of orders."""
_MOST_TOKENS = 2**13
"""Most tokens of a clip whose order is drawn. Each cluster is one number in the picture."""
_MOST_CLASSES = 50
"""Most classes whose accuracy is shown."""
_FEATURES = {
    "attentive": "pre-trained, attentive",
    "linear": "pre-trained, linear",
    "knn": "pre-trained, 20 nearest neighbours",
    "untrained_attentive": "untrained network, attentive",
    "untrained": "untrained network, linear",
    "motion_energy": "motion energy of the pixels, linear",
    "one_frame": "pixels of one frame, linear",
}
"""Keys of a probe's summary and their names on the page."""
_LAYERS = {"layers": "linear", "untrained_layers": "linear, untrained", "attentive_layers": "attentive"}

_PROBES = {"linear": "Linear probe", "knn": "Nearest neighbours", "attentive": "Attentive probe"}

Rows = list[list[str]]


def write_run_page(folder: Path, page: Path, *, trust: bool) -> None:
    """Write the page about the run in `folder`. `trust` allows running a tokenizer that is a TorchScript program.

    Raises:
        ValueError: if a file of the run, of its cache or of its tokenizer is missing or has other fields than those files have.
    """
    # All files are checked before anything is drawn.
    summary = _read(folder / "summary.json", Pretraining)
    if (summary["bits_per_code"] is None) != (summary["unigram_bits"] is None):
        raise ValueError(f"{folder}/summary.json: one of bits_per_code and unigram_bits is null")
    environment = _read(folder / "environment.json", Environment)
    choices = _read(folder / "choices.json", dict[str, str])
    cache = TokenCache.open(cache_of(folder))
    probe_files = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    probes = [_read(file, Probing) for file in probe_files]
    validated = "held out" if hold_out(cache.videos)[1] else "training clips"
    values = {
        "title": f"{summary['objective']} on {cache.name}",
        "tiles": _tiles(summary, probes, validated),
        "probes": [_probe(probe) for probe in probes],
        "curves": _curves(folder, summary, validated),
        "snippet": features_snippet(folder),
        "order": _order(folder),
        "tokenizer": _tokenizer(cache, trust),
        "collapse": collapse_warning(
            cache.manifest["codes_used"], sum(cache.layout.vocabularies), cache.manifest["codes"]
        ),
        "cache": cache,
        "rate": _rate(cache),
        "skipped": [[entry["path"], entry["reason"]] for entry in cache.manifest["skipped"]],
        "commands": _commands(folder, cache),
        "environment": environment,
        "choices": choices,
    }
    write_page(page, "report.html", values)


def _rate(cache: TokenCache) -> str:
    """Return the bits of the codes without entropy coding, per place and per second of video."""
    bits = fixed_bits(cache)
    text = f"{bits * cache.layout.codes_per_place:.1f} bits per place"
    rate = bits_per_second(cache, bits)
    return text if rate is None else f"{text}, {rate / 1000:,.1f} kbit per second of video"


def _read(file: Path, kind: Any) -> Any:
    """Read a JSON file of a run, which somebody else may have made."""
    return conform(read_json(file), kind, str(file))


def _tiles(summary: dict[str, Any], probes: list[dict[str, Any]], validated: str) -> Rows:
    """List the name, value and note of each main result, starting with the newest probe. `validated` names the clips."""
    tiles = []
    if probes:
        linear, untrained = probes[-1]["linear"], probes[-1]["untrained"]
        error = "" if linear["stderr"] is None else f"± {linear['stderr']:.3f}, "
        tiles.append(["frozen linear probe", f"{linear['mean']:.3f}", f"{error}n = {probes[-1]['n']}"])
        tiles.append(["untrained network", f"{untrained['mean']:.3f}", f"chance {probes[-1]['chance']:.3f}"])
    bits, unigram = summary["bits_per_code"], summary["unigram_bits"]
    measure, name = _loss(summary)
    if bits is None:
        # Runs of earlier versions have not recorded the baseline.
        baseline = summary.get("pixel_baseline")
        note = "" if baseline is None else f"predicting the mean of each tubelet gives {baseline:.3f}"
        tiles.append([f"{name}, {validated}", f"{summary[measure]:.3f}", note])
    else:
        saved = 1 - bits / unigram if unigram else 0
        note = f"{abs(100 * saved):.0f} % {'below' if saved >= 0 else 'above'} the unigram entropy of {unigram:.2f}"
        tiles.append([f"{name}, {validated}", f"{bits:.2f}", note])
    note = f"{summary['step']} steps in {summary['seconds']:.0f} s"
    tiles.append(["clips per second", f"{summary['clips_per_second']:.0f}", note])
    return tiles


def _probe(probe: dict[str, Any]) -> dict[str, Any]:
    """Add a chart and the rows of two tables to the summary of a probe."""
    bars = {name: (probe[key]["mean"], probe[key]["stderr"] or 0.0) for key, name in _FEATURES.items() if key in probe}
    accuracies = [[name, mean_with_error(probe[key])] for key, name in _FEATURES.items() if key in probe]
    columns = {key: name for key, name in _LAYERS.items() if key in probe}
    layers = zip(*(probe[key] for key in columns), strict=True)
    return {
        **probe,
        "cache": Path(probe["cache"]).name,
        "verdicts": _verdicts(probe),
        "attentive_training": probe.get("attentive_training"),
        "split": folds_in_words(probe["folds"]),
        # Probes of earlier versions have recorded neither.
        "in_pretraining": pretraining_in_words(probe.get("in_pretraining")),
        "notes": probe.get("notes", []),
        "classes": _classes(probe.get("per_class", {})),
        "chart": bar_chart(bars, x="accuracy on clips held out from the probe", level=("chance", probe["chance"])),
        "accuracies": [*accuracies, ["most common class", f"{probe['chance']:.3f}"]],
        "layer_columns": ["probe", *columns.values()],
        "layer_accuracies": [[f"layer {i}", *map(mean_with_error, layer)] for i, layer in enumerate(layers, start=1)],
    }


def _classes(per_class: dict[str, dict[str, float]]) -> Rows:
    """List the accuracy of the linear probe and the number of videos of each class, the worst class first."""
    worst = sorted(per_class, key=lambda name: (per_class[name].get("linear", 0.0), name))[:_MOST_CLASSES]
    return [[name, f"{per_class[name].get('linear', 0.0):.3f}", f"{per_class[name].get('n', 0):.0f}"] for name in worst]


def _verdicts(probe: dict[str, Any]) -> list[str]:
    """State for each probe whether the network is better than the untrained one, and than the better pixel baseline."""
    baselines = {name: probe[name]["mean"] for name in ("motion_energy", "one_frame") if name in probe}
    texts = []
    gains = probe.get("gain", {})
    for name, title in _PROBES.items():
        if name not in gains:
            continue
        gain = gains[name]
        error = "" if gain["sampling"] is None else f", ± {100 * gain['sampling']:.1f} over tested clips"
        points = f"{100 * gain['mean']:+.1f} points{error}"
        verdict = {True: "better than", False: "no better than", None: "unknown whether better than"}[gain["ahead"]]
        text = f"{title}: {verdict} the untrained network ({points})"
        best = max(baselines, key=lambda key: baselines[key], default=None)
        if name in probe and best and probe[name]["mean"] <= baselines[best]:
            text += f", no better than the {best.replace('_', ' ')} of the pixels ({baselines[best]:.3f})"
        texts.append(f"{text}.")
    return texts


def _curves(folder: Path, summary: dict[str, Any], validated: str) -> Markup:
    """Draw the bits per code during training, or the squared error if the objective predicts no codes."""
    measure, name = _loss(summary)
    curves = {f"{validated}, all targets": _curve(folder, f"val_{measure}"), "training": _curve(folder, measure)}
    lines = {name: (steps, values) for name, (steps, values) in curves.items() if steps}
    level, value = "mean of each tubelet", summary.get("pixel_baseline")
    if measure == "bits_per_code":
        level, value = "unigram entropy of the cache", summary["unigram_bits"]
    return line_chart(lines, x="step", y=name, level=None if value is None else (level, value))


def _loss(summary: dict[str, Any]) -> tuple[str, str]:
    """Return the key and the name of the loss that the page shows."""
    if summary["bits_per_code"] is not None:
        return "bits_per_code", "bits per code"
    # The loss of MAM2 also contains weights and the alignment of latents.
    if "motion" in summary:
        return "motion", "squared error of normalised RGB differences"
    return "loss", "squared error of normalised pixels"


def _curve(run: Path, key: str) -> tuple[list[float], list[float]]:
    """Return the logged steps and values of a metric."""
    lines = [line for line in metrics_of(run) if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _order(folder: Path) -> dict[str, Any] | None:
    """Return the settings and maps of the cluster order, or None for an objective without clusters."""
    objective = load_objective(folder / "model")
    if not isinstance(objective, ARVideo):
        return None
    clusters = objective.clusters
    members_NK = clusters.members()
    return {
        "name": objective.order,
        "clusters": len(members_NK),
        "box": "×".join(map(str, clusters.box)),
        "kept": objective.kept,
        "tokens": members_NK.shape[1],
        "maps": _maps(objective) if members_NK.numel() <= _MOST_TOKENS else "",
    }


def _maps(objective: ARVideo) -> Markup:
    """Draw the order of the clusters of a few samples."""
    clusters = objective.clusters
    members_NK = clusters.members()
    rank_BN = cluster_order(clusters, objective.order, torch.arange(_SAMPLES)).argsort(dim=1)
    rank_BL = torch.empty(_SAMPLES, members_NK.numel(), dtype=torch.long)
    rank_BL[:, members_NK] = rank_BN[..., None].expand(-1, *members_NK.shape)
    return rank_maps(rank_BL.view(_SAMPLES, *clusters.grid).numpy(), len(members_NK))


def _tokenizer(cache: TokenCache, trust: bool) -> dict[str, Any]:
    """Return reconstructions of a few videos and, if the tokenizer is a run of this project, results of its training."""
    source = recorded_tokenizer(cache)
    try:
        tokenizer = load_recorded_tokenizer(cache, trust=trust)
        rows = np.linspace(0, len(cache) - 1, min(_SAMPLES, len(cache))).round().astype(int).tolist()
        pixels_BTHWC = torch.from_numpy(np.stack(list(canonical_clips(cache, rows))))
    except ValueError as error:
        return {"problem": str(error)}
    (batch,) = evaluation_batches(cache, rows, len(rows))
    picture = to_png(reconstruction_grid(pixels_BTHWC, tokenizer.decode(batch["codes_BTHW"])))
    training: dict[str, Any] | None = None
    curve, validated = Markup(), "validation"
    if (Path(source) / "summary.json").exists():
        training = _read(Path(source) / "summary.json", TokenizerTraining)
        steps, values = _curve(Path(source), "val_psnr")
        # Runs of earlier versions have not recorded whether anything was held out.
        if "held_out" in training:
            validated = "held-out" if training["held_out"] else "training"
        if len(steps) > 2:
            curve = line_chart({f"{validated} clips": (steps, values)}, x="step", y="PSNR in dB")
    picture_text = base64.b64encode(picture).decode()
    trained = {"training": training, "validated": validated, "curve": curve}
    return {"problem": None, "source": source, **trained, "picture": picture_text}


def _commands(folder: Path, cache: TokenCache) -> Rows:
    """List the commands of all runs behind this page, as shell-quoted words, in the order of their start."""
    related = [folder, Path(recorded_tokenizer(cache)), *(path.parent for path in folder.glob("*/environment.json"))]
    # Names contain the key. Paths may be relative to another working folder.
    caches = {
        cache.name,
        *(Path(str(_read(file, OfACache).get("cache"))).name for file in folder.glob("*/summary.json")),
    }
    places = (folder.resolve().parent, RUNS)
    tokenize_runs = [file for place in places for file in place.glob("tokenize-*/summary.json")]
    related += [file.parent for file in tokenize_runs if Path(str(_read(file, OfACache).get("cache"))).name in caches]
    environments = [(run.resolve(), run / "environment.json") for run in related]
    runs = {run: _read(file, Environment) for run, file in environments if file.exists()}
    started = sorted(runs.values(), key=lambda environment: environment["started"])
    commands = dict.fromkeys(tuple(environment["command"]) for environment in started)  # without duplicates
    return [["accelerate", "launch", *map(shlex.quote, command)] for command in commands]
