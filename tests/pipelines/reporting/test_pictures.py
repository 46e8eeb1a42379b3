"""Charts are legible: numbers contrast with their colours, and names do not lie across curves."""

import re

import numpy as np
import pytest

from pipelines.reporting.pictures import INK, line_chart, rank_maps


@pytest.mark.parametrize("side", [2, 4, 8])
def test_numbers_contrast_with_their_colours(side: int) -> None:
    """The first cluster of an order is dark, and the last one is yellow."""
    chart = rank_maps(np.arange(side**2).reshape(1, 1, side, side), side**2)
    colours = {int(number): fill for fill, number in re.findall(r"fill: (#\w+)\" [^>]*>(\d+)</text>", chart)}
    assert len(colours) == side**2
    assert (colours[1], colours[side**2]) == ("#ffffff", INK)


@pytest.mark.parametrize("lines", [1, 2])
def test_the_name_of_a_level_is_in_the_legend(lines: int) -> None:
    curves = {f"curve {i}": ([0, 1], [2.0 + i, 1.0]) for i in range(lines)}
    chart = line_chart(curves, x="step", y="bits", level=("unigram entropy", 1.5))
    plot, legend = chart.split('id="legend_1"')
    assert "unigram entropy" in legend and "unigram entropy" not in plot
