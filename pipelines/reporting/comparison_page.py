"""HTML page of a comparison: verdict, table, curves and protocol."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ar_model.folds import folds_in_words
from data.schema import conform
from pipelines.engine.run_files import environment_of
from pipelines.engine.summaries import Comparison
from pipelines.evaluation.comparison import RANKING
from pipelines.reporting.pages import mean_with_error, pretraining_in_words, write_page
from pipelines.reporting.pictures import bar_chart, line_chart

Row = Mapping[str, Any]
"""Summary of a comparison, or one row of its table."""

_BASELINES = {
    "one_frame": "one frame at 16x16 in colour",
    "motion_energy": "motion energy at 16x16",
    "chance": "most common class",
}
MISSED = 0.2
"""Relative difference from a budget in seconds above which the page shows a caveat."""


def write_comparison(folder: Path, summary: Row) -> Path:
    """Write index.html in the folder of a finished comparison, and return its path. Raises ValueError for other content."""
    conform(summary, Comparison, str(folder / "summary.json"))
    rows = sorted(summary["table"], key=lambda row: -max(row[probe]["mean"] for probe in RANKING))
    bars = {
        _BASELINES[key]: (summary[key]["mean"], summary[key]["stderr"] or 0.0) for key in ("motion_energy", "one_frame")
    }
    values = {
        "title": f"{len(rows)} objectives at {summary['budget']} each",
        "verdicts": [verdict(rows, probe, summary["leads"][probe]) for probe in RANKING],
        "caveats": caveats(rows, summary),
        "rows": rows,
        "bits": bits_by_conditioning(rows),
        "curves": [_curves(rows, summary, of_time=True), _curves(rows, summary, of_time=False)],
        "layers": [_layers(rows, summary, "attentive"), _layers(rows, summary, "linear")],
        "baselines": bar_chart(bars, x="linear probe", level=(_BASELINES["chance"], summary["chance"])),
        "split": folds_in_words(summary["folds"]),
        # Comparisons of earlier versions have not counted them.
        "in_pretraining": pretraining_in_words(summary.get("in_pretraining")),
        "versions": environment_of(folder)["versions"],
        "summary": summary,
    }
    return write_page(folder / "index.html", "comparison.html", values)


def verdict(rows: Sequence[Row], probe: str, lead: Row | None) -> str:
    """State the best entry by a probe and whether it is ahead of the second; `lead` is from `leads_of`."""
    best = max(rows, key=lambda row: (lead is not None and row["entry"] == lead["best"], row[probe]["mean"]))
    accuracy, name, title = mean_with_error(best[probe]), best["entry"], f"{probe.capitalize()} probe"
    if lead is None:
        return f"{title}: {name} has {accuracy}."
    of = f"of {len(rows)} entries"
    if lead["tied"]:
        return f"{title}: {lead['best']} and {lead['second']} are tied, with the highest accuracy {of}: {accuracy}."
    above = f"{100 * lead['mean']:.1f} points above {lead['second']}"
    if lead["ahead"] is None:
        chance = "with one seed, or one group of tested clips, it is unknown whether that is due to chance"
        return f"{title}: {name} has the highest accuracy {of}, {accuracy}, {above}; {chance}."
    errors = f"± {100 * lead['stderr']:.1f} over seeds, ± {100 * lead['sampling']:.1f} over tested clips"
    if lead["ahead"]:
        return f"{title}: {name} is ahead, the best {of}: {accuracy}, {above} ({errors})."
    return f"{title}: no entry is ahead. The highest accuracy {of} is {name}'s, {accuracy}, only {above} ({errors})."


def bits_by_conditioning(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return what is predicted from what -> entry -> bits per code. Only values with equal conditions are comparable."""
    table: dict[str, dict[str, float]] = {}
    for row in sorted((row for row in rows if row["bits_per_code"] is not None), key=lambda row: row["bits_per_code"]):
        # Comparisons of earlier versions had one cache.
        conditions = f"{row['conditioning']}, cache {row['cache']}" if "cache" in row else row["conditioning"]
        table.setdefault(conditions, {})[row["entry"]] = row["bits_per_code"]
    return table


def caveats(rows: Sequence[Row], summary: Row) -> list[tuple[str, list[str]]]:
    """List the reasons to doubt some results, each with the entries concerned; none if it concerns the cache."""
    budget, unit = summary["budget"].split()
    baseline = max(("one_frame", "motion_energy"), key=lambda name: summary[name]["mean"])
    below_baseline, off_budget, warming_up, below_chance = [], [], [], []
    not_ahead: dict[str, list[str]] = {probe: [] for probe in RANKING}
    for row in rows:
        name, seconds, knn = row["entry"], row["seconds"]["mean"], row["knn"]["mean"]
        for probe in RANKING:
            gain = row["gain"][probe]
            # With one seed, the error of a gain is unknown.
            if not (gain["mean"] > 0 if gain["ahead"] is None else gain["ahead"]):
                not_ahead[probe].append(f"{name} ({100 * gain['mean']:+.1f} points)")
        if max(row[probe]["mean"] for probe in RANKING) <= summary[baseline]["mean"]:
            below_baseline.append(name)
        if unit == "seconds" and abs(seconds / float(budget) - 1) > MISSED:
            off_budget.append(f"{name} ({seconds:.0f})")
        if 2 * row["warmup"] > row["steps"]:
            warming_up.append(f"{name} ({row['warmup']} of {row['steps']} steps)")
        if knn < summary["chance"] / 2:
            below_chance.append(f"{name} ({knn:.3f})")
    margin = " by more than its errors" if summary["seeds"] > 1 else ""
    texts = [
        *((f"Not better than the untrained network{margin}, {probe} probe", not_ahead[probe]) for probe in RANKING),
        (f"No better than {_BASELINES[baseline]} without a network ({summary[baseline]['mean']:.3f})", below_baseline),
        (f"Training time is far from the budget of {budget} seconds (wrong speed estimate)", off_budget),
        ("Most steps are learning-rate warm-up; use a larger budget", warming_up),
        (
            "kNN is far below chance; if a scene occurs in several classes, set the scene as the group of its videos",
            below_chance,
        ),
    ]
    # Comparisons of earlier versions have no notes.
    notes = [(note.removeprefix("WARNING: "), concerned) for note, concerned in summary.get("notes", {}).items()]
    return [*notes, *((text, entries) for text, entries in texts if entries)]


def _curves(rows: Sequence[Row], summary: Row, *, of_time: bool) -> Markup:
    """Draw the accuracy of the linear probe during training over seconds or over clips seen."""
    points = {}
    for row in rows:
        xs = [point["seconds"] if of_time else point["step"] * row["clips"] / row["steps"] for point in row["curve"]]
        points[row["entry"]] = (xs, row["curve"])
    return _chart(points, summary, x="seconds of training" if of_time else "clips seen", y="linear probe")


def _layers(rows: Sequence[Row], summary: Row, probe: str) -> Markup:
    """Draw the accuracy of a probe on each layer."""
    points = {row["entry"]: (range(1, len(row["layers"][probe]) + 1), row["layers"][probe]) for row in rows}
    return _chart(points, summary, x="layer", y=f"{probe} probe")


def _chart(points: Mapping[str, tuple[Sequence[float], list[Row]]], summary: Row, *, x: str, y: str) -> Markup:
    """Draw {mean, stderr} of each entry as a line, and the accuracy of the most common class as a horizontal line."""
    lines = {entry: (xs, [value["mean"] for value in values]) for entry, (xs, values) in points.items()}
    errors = {entry: [value["stderr"] or 0.0 for value in values] for entry, (_, values) in points.items()}
    return line_chart(lines, x=x, y=y, errors=errors, level=(_BASELINES["chance"], summary["chance"]))
