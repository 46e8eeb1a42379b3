"""The page of a comparison: what came out, as a table and curves, and how."""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ar_model.probes import folds_in_words
from pipelines.pages import write_page
from pipelines.pictures import bar_chart, line_chart
from pipelines.run import environment_of

_BASELINES = {
    "one_frame": "one frame, 16x16 colours",
    "motion_energy": "motion energy, 16x16",
    "chance": "most common class",
}


def write_comparison(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Write index.html of a finished comparison into its folder."""
    rows = sorted(summary["table"], key=lambda row: -row["attentive"]["mean"])
    best = rows[0]
    sections = {
        "title": escape(f"{len(rows)} objectives at {summary['budget']} each"),
        "lead": _lead(best, rows[1:], summary),
        "table": _table(rows),
        "time": _curves(rows, "seconds", "seconds of training", summary),
        "steps": _curves(rows, "clips", "clips seen", summary),
        "layers": _layers(rows, summary),
        "baselines": _baselines(summary),
        "protocol": _protocol(summary),
        "environment": escape(str(environment_of(folder)["versions"])),
    }
    page = folder / "index.html"
    write_page(page, "comparison.html", sections, width="72rem")
    return page


def _lead(best: Mapping[str, Any], others: list[Any], summary: Mapping[str, Any]) -> str:
    """Who is ahead, and whether by more than the seeds differ."""
    mean, error = best["attentive"]["mean"], best["attentive"]["stderr"]
    words = [f"<b>{escape(best['entry'])}</b> has the best attentive probe: {_share(best['attentive'])}"]
    if others and summary["seeds"] == 1:
        words.append("; <b>one seed</b>: whether that is more than chance is not known")
    elif others:
        second = others[0]["attentive"]
        apart = mean - second["mean"]
        clear = apart > (error**2 + second["stderr"] ** 2) ** 0.5
        words.append(
            f", {100 * apart:.1f} points ahead of {escape(others[0]['entry'])}, "
            f"{'more' if clear else '<b>not more</b>'} than one standard error of the difference"
        )
    vain = [row for row in (best, *others) if row["attentive"]["mean"] <= row["untrained_attentive"]["mean"]]
    names = ", ".join(f"{escape(row['entry'])} ({row['untrained_attentive']['mean']:.3f})" for row in vain)
    sampling = (mean * (1 - mean) / summary["n"]) ** 0.5
    return (
        f"<p>{''.join(words)}. {f'<b>No better than its own untrained network: {names}.</b> ' if vain else ''}"
        f"Errors (±) are of {summary['seeds']} seeds; "
        f"that of drawing {summary['n']} tested clips, common to all, is ± {sampling:.3f}.</p>"
    )


def _table(rows: list[Any]) -> str:
    columns: dict[str, Callable[[Any], str]] = {
        "objective": lambda row: escape(row["entry"]),
        "attentive": lambda row: _cell(row["attentive"]),
        "linear": lambda row: _cell(row["linear"]),
        "kNN": lambda row: _cell(row["knn"]),
        "over untrained": lambda row: f"{100 * (row['attentive']['mean'] - row['untrained_attentive']['mean']):+.1f}",
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


def _share(value: Mapping[str, float]) -> str:
    """Mean and standard error, which one seed has not."""
    return f"{value['mean']:.3f}" + (f" ± {value['stderr']:.3f}" if value["stderr"] else "")


def _cell(value: Mapping[str, float]) -> str:
    return _share(value).replace(" ±", "<br>±")


def _curves(rows: list[Any], key: str, x: str, summary: Mapping[str, Any]) -> str:
    """Linear probe on the way of each training."""
    lines, errors = {}, {}
    for row in rows:
        errors[row["entry"]] = [point["stderr"] for point in row["curve"]]
        xs = [
            point["seconds"] if key == "seconds" else point["step"] * row["clips"] / row["steps"]
            for point in row["curve"]
        ]
        lines[row["entry"]] = (xs, [point["mean"] for point in row["curve"]])
    return line_chart(lines, x=x, y="linear probe", errors=errors, level=("most common class", summary["chance"]))


def _layers(rows: list[Any], summary: Mapping[str, Any]) -> str:
    charts = []
    for probe in ("attentive", "linear"):
        lines = {
            row["entry"]: (
                list(range(1, len(row["layers"][probe]) + 1)),
                [layer["mean"] for layer in row["layers"][probe]],
            )
            for row in rows
        }
        charts.append(line_chart(lines, x="layer", y=f"{probe} probe", level=("most common class", summary["chance"])))
    return "".join(f"<div>{chart}</div>" for chart in charts)


def _baselines(summary: Mapping[str, Any]) -> str:
    bars = {
        _BASELINES[name]: (summary[name]["mean"], summary[name]["stderr"]) for name in ("motion_energy", "one_frame")
    }
    chart = bar_chart(bars, x="linear probe", level=("most common class", summary["chance"]))
    return f"<p>Their errors are of drawing the tested clips and of {summary['seeds']} cuts into folds.</p>{chart}"


def _protocol(summary: Mapping[str, Any]) -> str:
    lines = {
        "cache": f"{summary['cache']}: {summary['videos']} videos, {summary['labelled']} labelled, {summary['classes']} classes",
        "budget": f"{summary['budget']} for each training; {summary['seeds']} seeds: of weights, order of clips, masks and folds",
        "tested": f"{summary['n']} clips: {folds_in_words(summary['folds'])}",
        "probe": summary["protocol"],
        "on the way": "the learning rate reaches zero at the end of the budget: earlier points are not what a shorter one gives",
        "memory": "most bytes of tensors on a GPU, of the whole process with its libraries on a CPU",
        "device": summary["device"],
    }
    rows = "".join(f"<tr><td>{name}</td><td>{escape(text)}</td></tr>" for name, text in lines.items())
    return f"<table>{rows}</table>"
