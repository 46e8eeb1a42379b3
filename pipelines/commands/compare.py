"""Which objective, on these videos, for this budget: several objectives and seeds on one cache, probed alike, on one page."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from ar_model.objectives import load_objective
from ar_model.probes import ATTENTIVE, PROTOCOL, chance
from data.cache import TokenCache, find_cache
from data.files import sha256_of, write_json
from data.loading import BatchPlan, TokenDataset
from pipelines.commands.pretrain_ar import check_pairs
from pipelines.engine.code_spec import code_spec
from pipelines.engine.config import parse
from pipelines.engine.console import progress, say
from pipelines.engine.device import device_name, resolve_precision, start_accelerator
from pipelines.engine.run import Run, metrics_of, read_json, summary_of
from pipelines.engine.sweep import Job, run_in_parallel, train
from pipelines.evaluation.baselines import baselines
from pipelines.evaluation.features import LabelledVideos, collect
from pipelines.reporting.comparison_page import write_comparison
from pipelines.settings.compare import Compare
from pipelines.settings.pretrain_ar import Pretrain

PROBES = ("attentive", "linear", "knn")
_TIMED_STEPS = 40
"""Steps of the short training that says how many fit into a time; the first ten do not count."""


Jobs = dict[tuple[str, int], Job]


def main(config: Compare, settings: str) -> dict[str, Any]:
    cache = TokenCache.open(find_cache(config.caches, config.cache))
    labelled = LabelledVideos.of(cache)
    parsed = {file.stem: _settings(file, cache) for file in config.files}
    entries = {name: entry for name, (entry, _) in parsed.items()}
    texts = {name: text for name, (_, text) in parsed.items()}
    run = Run("compare", config, settings, about=sha256_of([cache.key, texts, PROTOCOL, ATTENTIVE]))
    accelerator = start_accelerator(resolve_precision("auto"))
    if accelerator.num_processes > 1:
        raise ValueError("compare starts the trainings itself: start it as one process")
    run.begin(accelerator)
    if run.finished:
        say(accelerator, f"{run.folder} is finished: nothing is left to do")
    else:
        beside = _baselines(accelerator, cache, labelled, config.seeds)  # first: it fails where the videos are gone
        steps = _steps(config, run.folder, cache, entries, accelerator.device)
        jobs = {
            (file.stem, seed): _job(run.folder, file, seed, steps[file.stem], config.points)
            for seed in range(config.seeds)
            for file in config.files
        }
        networks = len(jobs) * (config.points + 1)
        say(accelerator, f"{len(jobs)} trainings, then probes of about {networks} networks, trained and untrained")
        train(list(jobs.values()), cache, accelerator.device)
        found = _probe_all(cache, accelerator.device, jobs)
        table = [_row(file.stem, entries[file.stem], jobs, found) for file in config.files]
        run.finish(accelerator, {**_about(config, cache, labelled, accelerator), "table": table, **beside})
    page = write_comparison(run.folder, run.summary())
    say(accelerator, f"open {page}")
    return {**run.summary(), "page": str(page)}


def _baselines(accelerator: Accelerator, cache: TokenCache, labelled: LabelledVideos, seeds: int) -> dict[str, Any]:
    bar = progress(accelerator, len(labelled.rows), "baselines")
    with threadpool_limits(torch.get_num_threads()):
        said = baselines(cache, labelled, [labelled.folds(seed) for seed in range(seeds)], bar)
    bar.close()
    return said


def _settings(file: Path, cache: TokenCache) -> tuple[Pretrain, str]:
    """What a file says of pretrain_ar, and that as YAML; a ValueError if the cache does not allow it."""
    if not file.is_file():
        raise ValueError(f"entries: {file} is no file")
    try:
        settings, text = parse(Pretrain, ["--config", str(file)], prog=f"compare: {file}")
        with torch.device("meta"):
            objective = settings.objective(code_spec(cache))
        check_pairs(objective, settings)
        plan = BatchPlan(samples=len(cache), batch_size=1, seed=0)
        TokenDataset(cache, range(len(cache)), plan, pixels=objective.needs_pixels, pairs=objective.needs_pairs)
    except ValueError as error:
        raise ValueError(f"entries: {file}: {error}") from None
    return settings, text


def _steps(
    config: Compare, folder: Path, cache: TokenCache, entries: dict[str, Pretrain], device: torch.device
) -> dict[str, int]:
    """Optimizer steps of each entry, written down, so that a comparison that goes on has the same."""
    file = folder / "steps.json"
    if not file.exists():
        steps = dict.fromkeys(entries, config.amount)
        if config.budget == "clips":
            steps = {name: math.ceil(config.amount / entry.batch_size) for name, entry in entries.items()}
        if config.budget == "seconds":
            quiet = ["--validate_every", str(_TIMED_STEPS)]
            jobs = {
                name: Job(name, folder / "timing" / name, _TIMED_STEPS, 0, [*_flags(path), *quiet])
                for name, path in ((path.stem, path) for path in config.files)
            }
            train(list(jobs.values()), cache, device, "timing")
            steps = {name: max(1, round(config.amount / _seconds_per_step(job.out))) for name, job in jobs.items()}
        write_json(file, steps)
    return {name: int(count) for name, count in read_json(file).items()}


def _seconds_per_step(run: Path) -> float:
    """Of a short run, after its first logged steps."""
    logged = [line for line in metrics_of(run) if "seconds" in line]
    first, last = logged[0], logged[-1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def _flags(file: Path) -> list[str]:
    return ["--config", str(file.resolve())]


def _job(folder: Path, file: Path, seed: int, steps: int, points: int) -> Job:
    every = ["--validate_every", str(math.ceil(steps / points)), "--snapshots", "true"]
    return Job(file.stem, folder / "runs" / f"{file.stem}-seed{seed}", steps, seed, [*_flags(file), *every])


def _probe_all(cache: TokenCache, device: torch.device, jobs: Jobs) -> dict[Path, dict[str, Any]]:
    """What the probes of every model say, by its folder; kept beside the models, so that none is probed twice."""
    models = [(job, model) for job in jobs.values() for model in (job.out / "untrained", *_models(job.out))]
    with TemporaryDirectory(prefix="arvideo-compare-") as space:  # of this process, which lives to delete it
        todo = [(cache.address, job, model, space) for job, model in models if not _said_of(model).exists()]
        run_in_parallel(_probe, todo, device, "probe")
    return {model: read_json(_said_of(model)) for _, model in models}


def _said_of(model: Path) -> Path:
    """What the probes of a model say."""
    run = model.parents[model.parent.name == "snapshots"]
    return run / f"probe-{model.name}.json"


def _probe(address: str, job: Job, model: Path, space: str) -> None:
    """Probe one model of a training: its untrained network and the last one in all ways, those between without attention."""
    cache = TokenCache.open(address)
    labelled, accelerator = LabelledVideos.of(cache), start_accelerator(resolve_precision("auto"))
    trained = model.name != "untrained"
    with TemporaryDirectory(dir=space) as folder:
        torch.manual_seed(job.seed)
        objective = load_objective(model if trained else job.out / "model", trained=trained)
        tokens = None if model.parent.name == "snapshots" else Path(folder)
        features = collect(accelerator, objective, cache, labelled.rows, None, tokens)
        accuracy = features.probe(labelled.y_N, labelled.folds(job.seed), accelerator.device)
    write_json(_said_of(model), asdict(accuracy))


def _models(run: Path) -> list[Path]:
    """Those on the way and the last one, in the order of their steps."""
    return [*sorted(run.glob("snapshots/step_*")), run / "model"]


def _row(name: str, entry: Pretrain, jobs: Jobs, found: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """All that is known of an entry: accuracies as {mean, stderr} over seeds."""
    mine = [job for (whose, _), job in jobs.items() if whose == name]
    said = [summary_of(job.out) for job in mine]
    last = [found[job.out / "model"] for job in mine]
    untrained = [found[job.out / "untrained"] for job in mine]
    seconds = [summary["seconds"] for summary in said]
    curve = [{"step": 0, "seconds": 0.0, **over_seeds([one["best"]["linear"] for one in untrained])}]
    for models in zip(*(_models(job.out) for job in mine), strict=True):
        step = mine[0].steps if models[0].name == "model" else int(models[0].name.removeprefix("step_"))
        linear = over_seeds([found[model]["best"]["linear"] for model in models])
        curve.append({"step": step, "seconds": round(np.mean(seconds) * step / mine[0].steps, 1), **linear})
    return {
        "entry": name,
        "objective": said[0]["objective"],
        "steps": mine[0].steps,
        "clips": mine[0].steps * entry.batch_size,
        "warmup": entry.warmup,
        "seconds": over_seeds(seconds),
        "clips_per_second": over_seeds([summary["clips_per_second"] for summary in said]),
        "peak_memory": max(summary["peak_memory"] for summary in said),
        "bits_per_code": _mean_or_none([summary["bits_per_code"] for summary in said]),
        **{probe: over_seeds([one["best"][probe] for one in last]) for probe in PROBES},
        **{f"untrained_{probe}": over_seeds([one["best"][probe] for one in untrained]) for probe in PROBES},
        "layers": {
            probe: [over_seeds(layer) for layer in zip(*(one["layers"][probe] for one in last), strict=True)]
            for probe in PROBES
        },
        "curve": curve,
    }


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error over trainings, None of one; the error of drawing the tested clips is common to all entries."""
    spread = round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 4), "stderr": spread}


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def _about(config: Compare, cache: TokenCache, labelled: LabelledVideos, accelerator: Accelerator) -> dict[str, Any]:
    folds = labelled.folds(0)
    return {
        "cache": cache.address,
        "videos": len(cache),
        "labelled": len(labelled.rows),
        "classes": len(set(labelled.y_N)),
        "n": sum(len(fold.test) for fold in folds),
        "folds": len(folds),
        "groups": len({group for group in labelled.groups if group}),
        "seeds": config.seeds,
        "budget": f"{config.amount} {config.budget}",
        "protocol": f"{PROTOCOL}; {ATTENTIVE}",
        "device": device_name(accelerator.device),
        "chance": round(chance(labelled.y_N, folds), 4),
    }
