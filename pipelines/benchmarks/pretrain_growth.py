"""Time of a training step as a function of the number of tokens, clusters and codes in the vocabulary, as SVG charts."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from data.files import write_bytes
from pipelines.benchmarks import Row, comparison
from pipelines.benchmarks.entrants import Shape, ours, videomae
from pipelines.benchmarks.pretrain_speed import by_turns
from pipelines.reporting.pictures import line_chart

SMALL = Shape(width=384, depth=12, heads=6, batch=2)
"""ViT-S, so that the measurement takes minutes on a CPU."""
FRAMES = (4, 8, 16, 32)
BOXES = ((4, 14, 14), (4, 7, 14), (4, 7, 7), (2, 7, 7), (1, 7, 7), (1, 7, 2), (2, 2, 2), (1, 2, 2))
VOCABULARIES = ((8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5), (8, 8, 8, 5, 5, 5))


def measure(folder: Path, device: torch.device, scale: float, shape: Shape = SMALL) -> Iterator[Row]:
    """Write growth-tokens.svg, growth-clusters.svg and growth-vocabulary.svg; yield rows that compare the ends of each curve."""
    rounds = max(1, round(4 * scale))
    build = partial(ours, device=device, attention="plain" if device.type == "cpu" else "sdpa", compiled=False)
    by_frames = [replace(shape, frames=frames) for frames in FRAMES]
    by_clusters = [replace(shape, clusters=box) for box in BOXES]
    by_vocabulary = [replace(shape, vocabulary=levels) for levels in VOCABULARIES]
    folder.mkdir(parents=True, exist_ok=True)
    for what, shapes, xs in (
        ("tokens", by_frames, [float(prod(s.grid)) for s in by_frames]),
        ("clusters", by_clusters, [prod(s.grid) / prod(s.clusters) for s in by_clusters]),
        ("vocabulary", by_vocabulary, [float(prod(s.vocabulary)) for s in by_vocabulary]),
    ):
        builders = {f"targets {targets}": partial(build, targets=targets) for targets in (0.25, 1.0)}
        if what == "tokens":
            builders["VideoMAE (sdpa)"] = partial(videomae, device=device, attention="sdpa", compiled=False)
        lines = {
            name: (xs, [by_turns([builder(s).seconds], rounds)[0] for s in shapes])
            for name, builder in builders.items()
        }
        file = folder / f"growth-{what}.svg"
        write_bytes(file, line_chart(lines, x=what, y="seconds per step", log=True).encode())
        print(f"    wrote {file}", file=sys.stderr, flush=True)
        for name, (_, ys) in lines.items():
            title = f"ViT-S, batch {shape.batch}, {name}: a step with {xs[-1]:,.0f} {what}"
            yield comparison(title, "ms", 1000 * ys[-1], 1000 * ys[0], f"with {xs[0]:,.0f}")
