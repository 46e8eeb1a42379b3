"""HTML page of a comparison: verdict, table, curves and protocol."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ar_model.probes import folds_in_words
from pipelines.engine.run import environment_of
from pipelines.reporting.pages import write_page
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
    """Write index.html in the folder of a finished comparison, and return its path."""
    rows = sorted(summary["table"], key=lambda row: -row["attentive"]["mean"])
    bars = {_BASELINES[key]: (summary[key]["mean"], summary[key]["stderr"]) for key in ("motion_energy", "one_frame")}
    values = {
        "title": f"{len(rows)} objectives at {summary['budget']} each",
        "best": rows[0],
        "second": rows[1] if len(rows) > 1 else None,
        "verdict": verdict(rows, summary["n"]),
        "caveats": caveats(rows, summary),
        "rows": rows,
        "curves": [_curves(rows, summary, of_time=True), _curves(rows, summary, of_time=False)],
        "layers": [_layers(rows, summary, "attentive"), _layers(rows, summary, "linear")],
        "baselines": bar_chart(bars, x="linear probe", level=(_BASELINES["chance"], summary["chance"])),
        "split": folds_in_words(summary["folds"]),
        "versions": environment_of(folder)["versions"],
        "summary": summary,
    }
    return write_page(folder / "index.html", "comparison.html", values)


def verdict(rows: Sequence[Row], tested: int) -> dict[str, Any]:
    """Compare the lead of the best row (the first) with its errors.

    Returns:
        `lead`: difference in accuracy from the second row; None for one row.
        `exceeds_seed_error`: whether the lead is larger than its standard error over seeds.
        `sampling_error`: binomial standard error of the best accuracy on `tested` clips.
        `exceeds_lead`: whether the sampling error is larger than the lead; false for one seed, where the page shows no lead.
    """
    best, *others = [row["attentive"] for row in rows]
    lead = best["mean"] - others[0]["mean"] if others else None
    sampling_error = (best["mean"] * (1 - best["mean"]) / tested) ** 0.5
    return {
        "lead": lead,
        "exceeds_seed_error": lead is not None and _is_ahead(best, others[0]),
        "sampling_error": sampling_error,
        "exceeds_lead": lead is not None and best["stderr"] is not None and lead < sampling_error,
    }


def _is_ahead(one: Row, other: Row) -> bool:
    """Return whether the difference is larger than its standard error over seeds, which is 0 for a single seed."""
    return one["mean"] - other["mean"] > math.hypot(one["stderr"] or 0.0, other["stderr"] or 0.0)


def caveats(rows: Sequence[Row], summary: Row) -> list[tuple[str, list[str]]]:
    """List the reasons to doubt some results, each with the entries concerned."""
    budget, unit = summary["budget"].split()
    baseline = max(("one_frame", "motion_energy"), key=lambda name: summary[name]["mean"])
    not_ahead, below_baseline, off_budget, warming_up, below_chance = [], [], [], [], []
    for row in rows:
        name, seconds, knn = row["entry"], row["seconds"]["mean"], row["knn"]["mean"]
        if not _is_ahead(row["attentive"], row["untrained_attentive"]):
            not_ahead.append(f"{name} ({row['untrained_attentive']['mean']:.3f})")
        if row["attentive"]["mean"] <= summary[baseline]["mean"]:
            below_baseline.append(name)
        if unit == "seconds" and abs(seconds / float(budget) - 1) > MISSED:
            off_budget.append(f"{name} ({seconds:.0f})")
        if 2 * row["warmup"] > row["steps"]:
            warming_up.append(f"{name} ({row['warmup']} of {row['steps']} steps)")
        if knn < summary["chance"] / 2:
            below_chance.append(f"{name} ({knn:.3f})")
    margin = " by more than one standard error" if summary["seeds"] > 1 else ""
    texts = [
        (f"Not better than the untrained network{margin}", not_ahead),
        (f"No better than {_BASELINES[baseline]} without a network ({summary[baseline]['mean']:.3f})", below_baseline),
        (f"Training time is far from the budget of {budget} seconds (wrong speed estimate)", off_budget),
        ("Most steps are learning-rate warm-up; use a larger budget", warming_up),
        (
            "kNN is far below chance; if a scene occurs in several classes, set the scene as the group of its videos",
            below_chance,
        ),
    ]
    return [(text, entries) for text, entries in texts if entries]


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
