"""Draw frames of a clip, their reconstruction from codes, and the random order in which clusters are predicted.

    python examples/draw_run.py RUN picture.png

RUN is a run folder of pretrain_ar with the objective ARVideo. `docs/demo.png` was made from the run of `make demo`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ar_model import load_objective
from ar_model.clusters import cluster_order
from data import TokenCache
from data.source_clips import canonical_clips
from tokenizer import load_tokenizer

CLIP = 3  # the video of the cache that is drawn


def main() -> None:
    run, out = Path(sys.argv[1]), sys.argv[2]
    cache = TokenCache.open(json.loads((run / "summary.json").read_text())["cache"])
    objective, tokenizer = load_objective(run), load_tokenizer(cache.made_with["tokenizer"])

    clip_THWC = next(canonical_clips(cache, [CLIP]))
    codes_1thw = torch.from_numpy(cache.codes(CLIP)[:1].astype("int64"))
    decoded_THWC = tokenizer.decode(codes_1thw)[0].numpy()
    members_NK = objective.clusters.members()
    rank_N = cluster_order(objective.clusters, objective.order, torch.tensor([CLIP]))[0].argsort()
    rank_L = torch.empty(members_NK.numel(), dtype=torch.long)
    rank_L[members_NK] = rank_N[:, None].expand_as(members_NK)
    rank_thw = rank_L.view(objective.clusters.grid).numpy()

    columns = len(rank_thw)  # one per time slice of codes
    frames = np.linspace(0, len(clip_THWC) - 1, columns).round().astype(int)
    figure = Figure(figsize=(1.15 * columns, 4.1), layout="constrained", dpi=110)
    axes = figure.subplots(3, columns)
    for column, frame in enumerate(frames):
        axes[0, column].imshow(clip_THWC[frame])
        axes[1, column].imshow(decoded_THWC[frame])
        axes[2, column].imshow(rank_thw[column], cmap="viridis", vmin=0, vmax=len(members_NK) - 1)
        for rank in np.unique(rank_thw[column]):
            y, x = np.argwhere(rank_thw[column] == rank).mean(0)
            colour = "white" if rank < 0.7 * len(members_NK) else "black"
            axes[2, column].annotate(str(rank + 1), (x, y), ha="center", va="center", color=colour, fontsize=9)
    for row, title in enumerate(("video", "decoded from\nits codes", "order of\nprediction")):
        axes[row, 0].set_ylabel(title, fontsize=9)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    figure.savefig(out)


if __name__ == "__main__":
    main()
