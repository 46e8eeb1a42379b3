"""Results of a comparison of objectives: one row per entry, and the lead of the best entry.

Legend: R seeds, M tested clips.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import TokenCache
from data.schema import conform
from pipelines.engine.run_files import summary_of
from pipelines.engine.summaries import ComparedRun
from pipelines.engine.sweep import Job
from pipelines.evaluation.errors import difference, mean_over_seeds
from pipelines.settings.pretrain_ar import Pretrain

PROBES = ("attentive", "linear", "knn")
RANKING = ("attentive", "linear")
"""Probes by which entries are ranked and held against their untrained networks."""

Outcome = Mapping[str, Any]
"""Content of `ar_model.probes.Outcomes` as JSON."""


@dataclass(frozen=True)
class Entry:
    """Entry of a comparison: its settings, parsed and as YAML, its cache, and what its loss predicts from what."""

    settings: Pretrain
    text: str
    cache: TokenCache
    conditioning: str


def models_of(run: Path) -> list[Path]:
    """Return the folders of the snapshots and of the final model of a training run, in the order of their steps."""
    return [*sorted(run.glob("snapshots/step_*")), run / "model"]


def row_of(
    name: str, entries: Mapping[str, Entry], jobs: Sequence[Job], outcomes: Mapping[Path, Outcome], groups_M: np.ndarray
) -> dict[str, Any]:
    """Return the row of an entry; most values are {mean, stderr} over its seeds.

    Args:
        jobs: training runs of all entries.
        outcomes: outcomes of each network by its folder.
        groups_M: group of each tested clip.
    """
    entry, own_jobs = entries[name].settings, [job for job in jobs if job.name == name]
    steps = own_jobs[0].steps
    summaries = [conform(summary_of(job.out), ComparedRun, str(job.out / "summary.json")) for job in own_jobs]
    final = [outcomes[job.out / "model"] for job in own_jobs]
    untrained = [outcomes[job.out / "untrained"] for job in own_jobs]
    seconds, bits = ([summary[key] for summary in summaries] for key in ("seconds", "bits_per_code"))
    curve = [{"step": 0, "seconds": 0.0, **_best(untrained, "linear")}]
    for models in zip(*(models_of(job.out) for job in own_jobs), strict=True):
        step = steps if models[0].name == "model" else int(models[0].name.removeprefix("step_"))
        elapsed = round(np.mean(seconds) * step / steps, 1)
        curve.append({"step": step, "seconds": elapsed, **_best([outcomes[model] for model in models], "linear")})
    return {
        "entry": name,
        "objective": summaries[0]["objective"],
        "cache": entries[name].cache.name,
        "conditioning": entries[name].conditioning,
        "steps": steps,
        "clips": steps * entry.batch_size,
        "warmup": entry.warmup,
        "seconds": mean_over_seeds(seconds),
        "clips_per_second": mean_over_seeds([summary["clips_per_second"] for summary in summaries]),
        "peak_memory": max(summary["peak_memory"] for summary in summaries),
        "bits_per_code": None if None in bits else round(float(np.mean(bits)), 4),
        **{probe: _best(final, probe) for probe in PROBES},
        **{f"untrained_{probe}": _best(untrained, probe) for probe in PROBES},
        "gain": {
            probe: _difference(final, untrained, probe, groups_M, len(entries) * len(RANKING)) for probe in RANKING
        },
        "layers": {probe: _layers(final, probe) for probe in PROBES},
        "curve": curve,
    }


def leads_of(final: Mapping[str, Sequence[Outcome]], groups_M: np.ndarray) -> dict[str, dict[str, Any] | None]:
    """Return for each probe the two best entries and their `difference`; None for a single entry.

    Args:
        final: outcomes of the trained networks of each entry, one per seed.
        groups_M: group of each tested clip.
    """
    leads: dict[str, dict[str, Any] | None] = dict.fromkeys(RANKING)
    count = len(final)
    if count > 1:
        for probe in RANKING:
            best, second = sorted(final, key=lambda name: -np.mean([one["best"][probe] for one in final[name]]))[:2]
            # The best entry is the most favourable of all ordered pairs, and each probe has a best entry.
            apart = _difference(final[best], final[second], probe, groups_M, count * (count - 1) * len(RANKING))
            leads[probe] = {"best": best, "second": second, **apart}
    return leads


def _difference(
    one: Sequence[Outcome], other: Sequence[Outcome], probe: str, groups_M: np.ndarray, comparisons: int
) -> dict[str, Any]:
    one_RM, other_RM = ([outcome["best"][probe] for outcome in outcomes] for outcomes in (one, other))
    return difference(one_RM, other_RM, groups_M, comparisons)


def _best(outcomes: Sequence[Outcome], probe: str) -> dict[str, float | None]:
    """Return mean accuracy and standard error over seeds, each at its selected layers."""
    return mean_over_seeds([float(np.mean(outcome["best"][probe])) for outcome in outcomes])


def _layers(outcomes: Sequence[Outcome], probe: str) -> list[dict[str, float | None]]:
    """Return mean accuracy and standard error over seeds for each layer, from first to last."""
    layers = zip(*(outcome["layers"][probe] for outcome in outcomes), strict=True)
    return [mean_over_seeds([float(np.mean(right_M)) for right_M in layer]) for layer in layers]
