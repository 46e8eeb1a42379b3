"""The page of a comparison: what came out, as a table and curves, and how."""

import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ar_model.probes import folds_in_words
from pipelines.engine.run import environment_of
from pipelines.reporting.pages import write_page
from pipelines.reporting.pictures import bar_chart, line_chart

_BASELINES = {
    "one_frame": "one frame, 16x16 colours",
    "motion_energy": "motion energy, 16x16",
    "chance": "most common class",
}
MISSED = 0.2
"""Share of a budget of seconds by which a training may miss it without a word."""


def write_comparison(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Write index.html of a finished comparison into its folder."""
    rows = sorted(summary["table"], key=lambda row: -row["attentive"]["mean"])
    best = rows[0]
    sections = {
        "title": escape(f"{len(rows)} objectives at {summary['budget']} each"),
        "lead": _lead(best, rows[1:], summary) + _caveats(rows, summary),
        "table": _table(rows),
        "time": _curves(rows, "seconds", "seconds of training", summary),
        "steps": _curves(rows, "clips", "clips seen", summary),
        "layers": _layers(rows, summary),
        "baselines": _baselines(summary),
        "protocol": _protocol(summary),
        "environment": escape(", ".join(f"{name} {said}" for name, said in environment_of(folder)["versions"].items())),
    }
    page = folder / "index.html"
    write_page(page, "comparison.html", sections, width="72rem")
    return page


def _lead(best: Mapping[str, Any], others: list[Any], summary: Mapping[str, Any]) -> str:
    """Who is ahead, and whether by more than the seeds differ."""
    mean, apart = best["attentive"]["mean"], math.inf
    words = [f"<b>{escape(best['entry'])}</b> has the best attentive probe: {_share(best['attentive'])}"]
    if others and summary["seeds"] == 1:
        words.append("; <b>one seed</b>: whether that is more than chance is not known")
    elif others:
        second = others[0]["attentive"]
        apart, clear = mean - second["mean"], _ahead(best["attentive"], second)
        words.append(
            f", {100 * apart:.1f} points ahead of {escape(others[0]['entry'])}, "
            f"{'more' if clear else '<b>not more</b>'} than one standard error of the difference"
        )
    seeds = f"Errors (±) are of {summary['seeds']} seeds; that" if summary["seeds"] > 1 else "The error"
    sampling = (mean * (1 - mean) / summary["n"]) ** 0.5
    larger = ", <b>larger than the lead</b>" if apart < sampling else ""
    drawing = f"{seeds} of drawing the {summary['n']} tested clips is ± {sampling:.3f} of each accuracy{larger}."
    return f"<p>{''.join(words)}. {drawing}</p>"


def _ahead(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """By more than one standard error of the difference, as far as seeds tell."""
    return one["mean"] - other["mean"] > math.hypot(one["stderr"] or 0.0, other["stderr"] or 0.0)


def _caveats(rows: list[Any], summary: Mapping[str, Any]) -> str:
    """Why the figures say less than they seem to."""
    floor = max(("one_frame", "motion_energy"), key=lambda name: summary[name]["mean"])
    budget, unit = summary["budget"].split()
    off = [row for row in rows if unit == "seconds" and abs(row["seconds"]["mean"] / float(budget) - 1) > MISSED]
    caveats = {
        "Not ahead of its own untrained network" + " by more than one standard error" * (summary["seeds"] > 1): [
            f"{row['entry']} ({row['untrained_attentive']['mean']:.3f})"
            for row in rows
            if not _ahead(row["attentive"], row["untrained_attentive"])
        ],
        f"No better than {_BASELINES[floor]}, without a network ({summary[floor]['mean']:.3f})": [
            row["entry"] for row in rows if row["attentive"]["mean"] <= summary[floor]["mean"]
        ],
        f"Not {budget} seconds, for which a short training foretold the steps": [
            f"{row['entry']} ({row['seconds']['mean']:.0f})" for row in off
        ],
        "Mostly warm-up of the learning rate; a larger budget would say more": [
            f"{row['entry']} ({row['warmup']} of {row['steps']} steps)"
            for row in rows
            if 2 * row["warmup"] > row["steps"]
        ],
        "Nearest neighbours far below chance, as where one scene was filmed in every class: name such groups": [
            f"{row['entry']} ({row['knn']['mean']:.3f})" for row in rows if row["knn"]["mean"] < summary["chance"] / 2
        ],
    }
    lines = [f"<li><b>{escape(what)}:</b> {escape(', '.join(names))}</li>" for what, names in caveats.items() if names]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _table(rows: list[Any]) -> str:
    columns: dict[str, Callable[[Any], str]] = {
        "objective": lambda row: escape(row["entry"]),
        "attentive": lambda row: _cell(row["attentive"]),
        "linear": lambda row: _cell(row["linear"]),
        "kNN": lambda row: _cell(row["knn"]),
        "points over untrained": lambda row: (
            f"{100 * (row['attentive']['mean'] - row['untrained_attentive']['mean']):+.1f}"
        ),
        "attentive, untrained": lambda row: _cell(row["untrained_attentive"]),
        "linear, untrained": lambda row: _cell(row["untrained_linear"]),
        "bits per code": lambda row: "" if row["bits_per_code"] is None else f"{row['bits_per_code']:.2f}",
        "steps": lambda row: f"{row['steps']:,}",
        "clips seen": lambda row: f"{row['clips']:,}",
        "seconds": lambda row: f"{row['seconds']['mean']:.0f}",
        "clips/s": lambda row: f"{row['clips_per_second']['mean']:.1f}",
        "peak memory": lambda row: f"{row['peak_memory'] / 2**20:,.0f} MiB",
    }
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell(row)}</td>' for cell in columns.values())}</tr>" for row in rows)
    return f'<table class="numbers"><tr>{head}</tr>{body}</table>'


def _share(value: Mapping[str, float | None]) -> str:
    """Mean and standard error, which one seed has not."""
    return f"{value['mean']:.3f}" + ("" if value["stderr"] is None else f" ± {value['stderr']:.3f}")


def _cell(value: Mapping[str, float | None]) -> str:
    return _share(value).replace(" ±", "<br>±")


def _curves(rows: list[Any], key: str, x: str, summary: Mapping[str, Any]) -> str:
    """Linear probe on the way of each training."""
    lines, errors = {}, {}
    for row in rows:
        errors[row["entry"]] = [point["stderr"] or 0.0 for point in row["curve"]]
        xs = [
            point["seconds"] if key == "seconds" else point["step"] * row["clips"] / row["steps"]
            for point in row["curve"]
        ]
        lines[row["entry"]] = (xs, [point["mean"] for point in row["curve"]])
    return line_chart(lines, x=x, y="linear probe", errors=errors, level=(_BASELINES["chance"], summary["chance"]))


def _layers(rows: list[Any], summary: Mapping[str, Any]) -> str:
    charts = []
    for probe in ("attentive", "linear"):
        layers = {row["entry"]: row["layers"][probe] for row in rows}
        lines = {
            entry: (list(range(1, len(found) + 1)), [layer["mean"] for layer in found])
            for entry, found in layers.items()
        }
        errors = {entry: [layer["stderr"] or 0.0 for layer in found] for entry, found in layers.items()}
        level = (_BASELINES["chance"], summary["chance"])
        charts.append(line_chart(lines, x="layer", y=f"{probe} probe", errors=errors, level=level))
    return "".join(f"<div>{chart}</div>" for chart in charts)


def _baselines(summary: Mapping[str, Any]) -> str:
    bars = {
        _BASELINES[name]: (summary[name]["mean"], summary[name]["stderr"]) for name in ("motion_energy", "one_frame")
    }
    chart = bar_chart(bars, x="linear probe", level=(_BASELINES["chance"], summary["chance"]))
    return f"<p>Errors: of drawing the tested clips{' and of the cuts into folds' * (summary['seeds'] > 1)}.</p>{chart}"


def _protocol(summary: Mapping[str, Any]) -> str:
    groups = f"; groups: {summary['groups'] or 'none'}" if summary["folds"] > 1 else ""
    lines = {
        "cache": f"{summary['cache']}: {summary['videos']} videos, {summary['labelled']} labelled, {summary['classes']} classes",
        "budget": f"{summary['budget']} for each training; seeds: {summary['seeds']}, of weights, order, masks and folds",
        "tested": f"{summary['n']} clips: {folds_in_words(summary['folds'])}{groups}",
        "probe": summary["protocol"],
        "on the way": "the learning rate reaches zero at the end of the budget: earlier points are not what a shorter one gives",
        "memory": "most bytes of tensors on a GPU, of the whole process with its libraries on a CPU",
        "device": summary["device"],
    }
    rows = "".join(f"<tr><td>{name}</td><td>{escape(text)}</td></tr>" for name, text in lines.items())
    return f"<table>{rows}</table>"
