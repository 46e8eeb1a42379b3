"""PNG grids of clips, and charts as SVG.

Legend: B clips, T H W C frames, height, width, channels.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from einops import rearrange
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image
from torch import Tensor

INK, MUTED, ACCENT, SECOND = "#1a1a1a", "#8a8a8a", "#0b6e99", "#c4622d"
_LINES = (ACCENT, SECOND, MUTED, "#5d8a2f", "#84539e", "#c29a1b", "#b13a5c", "#3c4f5a")
_DASHES = ("-", "--", ":")
"""Line styles. Each style is used with all colours before the next style."""
_LEGEND_COLUMNS = 3
_LUMINANCE = (0.2126, 0.7152, 0.0722)
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "arvideo",
    "svg.fonttype": "none",  # keep text as text, not as outlines
    "text.parse_math": False,  # a name may contain dollar signs
}


def reconstruction_grid(pixels_BTHWC: Tensor, video_BTHWC: Tensor, columns: int = 8) -> np.ndarray:
    """Draw three rows per clip, frames from left to right: input, reconstruction, and their difference around grey.

    Returns:
        uint8 image (3 * B * H, columns * W, C).
    """
    frames = np.linspace(0, pixels_BTHWC.shape[1] - 1, columns).round().astype(int)
    inputs, outputs = (x[:, frames].numpy() for x in (pixels_BTHWC, video_BTHWC))
    differences = (128 + (outputs.astype(np.int16) - inputs)).clip(0, 255).astype(np.uint8)
    rows = np.stack([inputs, outputs, differences], axis=1)
    return rearrange(rows, "b r t h w c -> (b r h) (t w) c")


def to_png(image_HWC: np.ndarray) -> bytes:
    """Encode a uint8 image as PNG."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return file.getvalue()


def save_png(image_HWC: np.ndarray, file: Path) -> None:
    """Write a uint8 image as PNG; missing folders are created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(to_png(image_HWC))


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    level: tuple[str, float] | None = None,
    log: bool = False,
) -> Markup:
    """Draw named lines as SVG.

    Args:
        lines: name -> x values and y values. The first line has the accent colour.
        errors: name -> standard errors of the y values, drawn as error bars.
        level: name and value of a horizontal line.
        log: make both axes logarithmic.
    """
    with matplotlib.rc_context(_STYLE):
        entries = len(lines) + (level is not None)
        legend_rows = math.ceil(entries / _LEGEND_COLUMNS)
        figure = Figure(figsize=(6.4, 3.5 + 0.2 * max(0, legend_rows - 2)), layout="constrained")
        axes = figure.subplots()
        for number, (name, (xs, ys)) in enumerate(lines.items()):
            colour = _LINES[number % len(_LINES)]
            style = _DASHES[number // len(_LINES) % len(_DASHES)]
            marker = "o" if len(xs) < 12 else None  # markers of many points would hide the line
            axes.plot(xs, ys, style, label=name, color=colour, linewidth=1.8, marker=marker, markersize=4)
            if errors:
                axes.errorbar(xs, ys, errors[name], color=colour, linewidth=0, elinewidth=1.2)
        if level is not None:
            axes.axhline(level[1], label=level[0], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if log:
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
                axis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set(xlabel=x, ylabel=y)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        if entries > 1:
            # Names within the axes would hide lines.
            figure.legend(frameon=False, loc="outside upper left", ncols=_LEGEND_COLUMNS)
        return _svg(figure)


def bar_chart(bars: Mapping[str, tuple[float, float]], *, x: str, level: tuple[str, float]) -> Markup:
    """Draw named horizontal bars as SVG.

    Args:
        bars: name -> value from 0 to 1 and its standard error. The first bar has the accent colour.
        level: name and value of a vertical line.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.5 + 0.42 * len(bars)), layout="constrained")
        axes = figure.subplots()
        values, errors = zip(*bars.values(), strict=True)
        positions = np.arange(len(bars))
        colours = [ACCENT] + ["#b9c4c9"] * (len(bars) - 1)
        axes.barh(positions, values, xerr=errors, height=0.62, color=colours, ecolor=INK)
        axes.set_yticks(positions, list(bars), color=INK)
        axes.invert_yaxis()
        axes.axvline(level[1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(level[0], (level[1], 1), xycoords=("data", "axes fraction"), ha="left", va="bottom", color=INK)
        axes.set(xlim=(0, 1), xlabel=x)
        return _svg(figure)


def rank_maps(rank_BTHW: np.ndarray, ranks: int) -> Markup:
    """Draw cluster orders as SVG: one row per sample, one map per time slice.

    Args:
        rank_BTHW: position of each token's cluster in the order of prediction, from 0, drawn as colour and number.
        ranks: number of clusters.
    """
    samples, slices = rank_BTHW.shape[:2]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.1 * slices, 1.15 * samples), layout="constrained")
        axes = figure.subplots(samples, slices, squeeze=False)
        for (b, t), panel in np.ndenumerate(axes):
            image = panel.imshow(rank_BTHW[b, t], cmap="viridis", vmin=0, vmax=max(1, ranks - 1))
            panel.set(xticks=[], yticks=[])
            for rank in np.unique(rank_BTHW[b, t]):
                y, x = np.argwhere(rank_BTHW[b, t] == rank).mean(0)
                colour = "white" if np.dot(image.to_rgba(rank)[:3], _LUMINANCE) < 0.45 else INK
                panel.annotate(str(rank + 1), (x, y), ha="center", va="center", color=colour, fontsize=8)
            if b == 0:
                panel.set_title(f"t = {t}", fontsize=8, color=MUTED)
        return _svg(figure)


def _svg(figure: Figure) -> Markup:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])
