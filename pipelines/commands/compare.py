"""Compare objectives and tokenizers: train all at an equal budget with several seeds, probe the models, and write one page."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from ar_model.folds import Fold, chance
from ar_model.objectives import Objective
from ar_model.probes import ATTENTIVE, PROTOCOL
from data.cache import TokenCache, find_cache
from data.files import sha256_of, write_json
from data.loading import BatchPlan, TokenDataset
from pipelines.commands.pretrain_ar import check_pairs, warnings_of
from pipelines.engine.code_spec import code_spec, with_likelihood
from pipelines.engine.config import parse
from pipelines.engine.console import progress, say, say_newest
from pipelines.engine.device import device_name, resolve_precision, start_accelerator
from pipelines.engine.run import Run
from pipelines.engine.run_files import metrics_of, read_json
from pipelines.engine.sweep import Job, run_in_parallel, train
from pipelines.evaluation.baselines import baselines
from pipelines.evaluation.collapse import collapse_warning
from pipelines.evaluation.comparison import Entry, leads_of, models_of, row_of
from pipelines.evaluation.features import EVALUATION, LabelledVideos, probe_model, seen_in_pretraining
from pipelines.reporting.comparison_page import write_comparison
from pipelines.settings.compare import Compare
from pipelines.settings.pretrain_ar import Pretrain

_TIMED_STEPS = 40
"""Steps of the short timing run that converts a budget in seconds to steps."""


def main(config: Compare, settings: str) -> dict[str, Any]:
    """Train and probe all entries, write the page, and return the summary. An interrupted comparison is resumed."""
    read = _read_entries(config)
    entries = {name: entry for name, (entry, _) in read.items()}
    cache = next(iter(entries.values())).cache
    labelled = LabelledVideos.of(cache)
    # A comparison on one cache has the same identity as before there could be several.
    keys = sorted({entry.cache.key for entry in entries.values()})
    texts = {name: entry.text for name, entry in entries.items()}
    about = [keys[0] if len(keys) == 1 else keys, texts, PROTOCOL, ATTENTIVE, EVALUATION]
    run = Run("compare", config, settings, about=sha256_of(about))
    accelerator = start_accelerator(resolve_precision("auto"))
    repetitions = [labelled.folds(seed) for seed in range(config.seeds)]
    notes = _notes(labelled, repetitions, read)
    for note, concerned in notes.items():
        say(accelerator, f"{', '.join(concerned)}: {note}" if concerned else note)
    if accelerator.num_processes > 1:
        raise ValueError("compare starts its own training runs: start it with python, not with accelerate launch")
    if run.begin_unless_finished(accelerator):
        # The baselines come first: they fail at once if the videos are no longer available.
        bar = progress(accelerator, len(labelled.rows), "baselines")
        with threadpool_limits(torch.get_num_threads()):
            pixels = baselines(cache, labelled, repetitions, bar)
        bar.close()
        steps = _steps(config, run.folder, entries, accelerator.device)
        jobs = []
        for seed in range(config.seeds):
            for file in config.files:
                out, count = run.folder / "runs" / f"{file.stem}-seed{seed}", steps[file.stem]
                every = math.ceil(count / config.points)
                jobs.append(_job(file, entries[file.stem], out, count, seed, every, "--snapshots", "true"))
        networks = len(jobs) * (config.points + 1)
        say(accelerator, f"{len(jobs)} training runs, then probes of about {networks} networks, trained and untrained")
        train(jobs, accelerator.device)
        outcomes = _probe_all(accelerator.device, jobs)
        final = {name: [outcomes[job.out / "model"] for job in jobs if job.name == name] for name in entries}
        groups_M = labelled.groups_of(next(iter(outcomes.values()))["tested"])
        table = [row_of(name, entries, jobs, outcomes, groups_M) for name in entries]
        addresses = dict.fromkeys(entry.cache.address for entry in entries.values())
        facts = {**_about(config, cache, labelled, accelerator), "cache": ", ".join(addresses), "notes": notes}
        run.finish(accelerator, {**facts, "table": table, "leads": leads_of(final, groups_M), **pixels})
    page = write_comparison(run.folder, run.summary())
    say(accelerator, f"open {page}")
    return {**run.summary(), "page": str(page)}


def _read_entries(config: Compare) -> dict[str, tuple[Entry, Objective]]:
    """Return all entries with their objectives, without weights.

    All entries use `--cache`. Without it, an entry uses the cache that its file names, else the newest one.

    Raises:
        ValueError: as `_read_entry`, or if the caches hold other labelled videos.
    """
    opened: dict[str | None, TokenCache] = {}

    def open_cache(name: str | None) -> TokenCache:
        if name not in opened:
            opened[name] = TokenCache.open(find_cache(config.caches, name))
            say_newest("--cache", name, opened[name].address)
        return opened[name]

    read = {file.stem: _read_entry(file, lambda own: open_cache(config.cache or own)) for file in config.files}
    first, *others = (entry.cache for entry, _ in read.values())
    for other in others:
        if _labelled(first) != _labelled(other):
            raise ValueError(f"entries: {first.address} and {other.address} have other videos or labels")
    return read


def _labelled(cache: TokenCache) -> list[tuple[str, str | None, str | None, str | None]]:
    return [(video.path, video.label, video.group, video.split) for video in cache.videos if video.label is not None]


def _read_entry(file: Path, open_cache: Callable[[str | None], TokenCache]) -> tuple[Entry, Objective]:
    """Read an entry from its settings file; return it with its objective, without weights. `open_cache` gets its `cache`.

    Raises:
        ValueError: if the file or its settings are invalid, or the cache lacks pixels or views that the objective needs.
    """
    if not file.is_file():
        raise ValueError(f"entries: no such file: {file}")
    try:
        settings, text = parse(Pretrain, ["--config", str(file)], prog=f"compare: {file}")
        cache = open_cache(settings.cache)
        with torch.device("meta"):
            objective = settings.objective(code_spec(cache))
        check_pairs(objective, settings)
        # Constructing a dataset checks that the cache has the pixels and views that the objective needs.
        plan = BatchPlan(samples=len(cache), batch_size=1, seed=0)
        TokenDataset(cache, range(len(cache)), plan, pixels=objective.needs_pixels, pairs=objective.needs_pairs)
    except ValueError as error:
        raise ValueError(f"entries: {file}: {error}") from None
    return Entry(settings, with_likelihood(text, cache), cache, objective.conditioning), objective


def _notes(
    labelled: LabelledVideos, repetitions: Sequence[Sequence[Fold]], entries: Mapping[str, tuple[Entry, Objective]]
) -> dict[str, list[str]]:
    """Return the reasons to doubt the results, before any training, each with its entries; none if it concerns all.

    The training runs print their warnings to nobody, so all warnings of pre-training are collected here.
    """
    notes: dict[str, list[str]] = {note: [] for note in (*labelled.notes, *labelled.unpredictable(repetitions))}
    first = next(iter(entries.values()))[0].cache
    for name, (entry, objective) in entries.items():
        cache = entry.cache
        if cache.clip != first.clip:
            notes.setdefault(f"motion energy and one frame see the clips of {first.name}, which are others", []).append(
                name
            )
        codes, vocabulary = cache.manifest["codes"], sum(cache.layout.vocabularies)
        collapse = collapse_warning(cache.manifest["codes_used"], vocabulary, codes)
        for warning in (*warnings_of(objective, cache), *([collapse] if collapse else [])):
            notes.setdefault(warning, []).append(name)
    return {note: [] if len(names) == len(entries) else names for note, names in notes.items()}


def _steps(config: Compare, folder: Path, entries: Mapping[str, Entry], device: torch.device) -> dict[str, int]:
    """Return the optimizer steps of each entry. A file stores them, because a resumed comparison must use the same numbers."""
    steps_file = folder / "steps.json"
    if not steps_file.exists():
        if config.budget == "clips":
            steps = {name: math.ceil(config.amount / entry.settings.batch_size) for name, entry in entries.items()}
        elif config.budget == "seconds":
            timing = folder / "timing"
            jobs = [
                _job(file, entries[file.stem], timing / file.stem, _TIMED_STEPS, 0, _TIMED_STEPS)
                for file in config.files
            ]
            train(jobs, device, "timing")
            steps = {job.name: max(1, round(config.amount / _seconds_per_step(job.out))) for job in jobs}
        else:
            steps = dict.fromkeys(entries, config.amount)
        write_json(steps_file, steps)
    return {name: int(count) for name, count in read_json(steps_file).items()}


def _seconds_per_step(run: Path) -> float:
    """Return the seconds per step of a short run, measured after its first logged step to exclude warm-up."""
    logged = [line for line in metrics_of(run) if "seconds" in line]
    first, last = logged[0], logged[-1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def _job(file: Path, entry: Entry, out: Path, steps: int, seed: int, validate_every: int, *flags: str) -> Job:
    """Return a training run with the settings of an entry's file."""
    own_flags = ["--config", str(file.resolve()), "--validate_every", str(validate_every)]
    return Job(file.stem, entry.cache.address, out, steps, seed, [*own_flags, *flags])


def _probe_all(device: torch.device, jobs: Sequence[Job]) -> dict[Path, dict[str, Any]]:
    """Return the outcomes of every model by its folder. Files store them, because no model should be probed twice."""
    models = [(job, model) for job in jobs for model in (job.out / "untrained", *models_of(job.out))]
    # Probe processes store tokens in this folder. If such a process is killed, this process still deletes the files.
    with TemporaryDirectory(prefix="arvideo-compare-") as scratch:
        calls = [(job, model, scratch) for job, model in models if not _probe_file(model).exists()]
        run_in_parallel(_probe, calls, device, "probe")
    return {model: read_json(_probe_file(model)) for _, model in models}


def _probe_file(model: Path) -> Path:
    """Return the file with the outcomes of a model, in the folder of its run."""
    run = model.parent.parent if model.parent.name == "snapshots" else model.parent
    return run / f"probe-{model.name}.json"


def _probe(job: Job, model: Path, scratch: str) -> None:
    """Probe one model of a training run; `untrained` has random initial weights. Snapshots get no attentive probe."""
    cache = TokenCache.open(job.cache)
    labelled = LabelledVideos.of(cache)
    accelerator = start_accelerator(resolve_precision("auto"))
    trained, attentive = model.name != "untrained", model.parent.name != "snapshots"
    network = model if trained else job.out / "model"
    folds = [labelled.folds(job.seed)]
    torch.manual_seed(job.seed)
    (outcomes,) = probe_model(
        accelerator, network, cache, labelled, folds, trained=trained, attentive=attentive, scratch=Path(scratch)
    )
    write_json(_probe_file(model), asdict(outcomes))


def _about(config: Compare, cache: TokenCache, labelled: LabelledVideos, accelerator: Accelerator) -> dict[str, Any]:
    folds = labelled.folds(0)
    return {
        "videos": len(cache),
        "labelled": len(labelled.rows),
        "classes": len(set(labelled.y_N)),
        "n": sum(len(fold.test) for fold in folds),
        "in_pretraining": seen_in_pretraining(cache, labelled, folds, cache),
        "folds": len(folds),
        "groups": len({group for group in labelled.groups if group}),
        "seeds": config.seeds,
        "budget": f"{config.amount} {config.budget}",
        "protocol": f"{PROTOCOL}; {ATTENTIVE}",
        "device": device_name(accelerator.device),
        "chance": round(chance(labelled.y_N, folds), 4),
    }
