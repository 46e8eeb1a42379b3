"""Write the features of every video of a folder, one vector per video.

    python examples/extract_features.py VIDEOS TOKENIZER_RUN RUN features.npz

VIDEOS is a value of the flag `--videos` of the commands. TOKENIZER_RUN is a run folder of train_tokenizer, and RUN is a
run folder of pretrain_ar. The output file contains `features_ND` (float32, N videos, D = time slices x width), `path_N` and,
if the videos have labels, `label_N`. Damaged videos are skipped and reported on stderr.
"""

import argparse
import sys

import numpy as np
import torch

from ar_model import load_objective
from ar_model.probes import slice_means
from data import ClipSpec, DamagedVideo, load_source, read_clip
from tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("videos", "tokenizer_run", "run", "out"):
        parser.add_argument(name)
    parser.add_argument("--stride", type=int, default=1, help="take every N-th frame, as in pre-training")
    arguments = parser.parse_args()

    tokenizer, objective = load_tokenizer(arguments.tokenizer_run), load_objective(arguments.run)
    clip, source = ClipSpec(stride=arguments.stride), load_source(arguments.videos)
    features, videos = [], []
    for video in source.videos:
        try:
            pixels_THWC = read_clip(source, video, clip, view=0)  # the middle of the video
        except DamagedVideo as damage:
            print(f"skipped {video.path}: {damage}", file=sys.stderr)
            continue
        batch = {"codes_BTHW": tokenizer.encode(torch.from_numpy(pixels_THWC)[None])}
        with torch.inference_mode():
            layer_BLD = objective.features(batch)[-1]  # the last block; `probe.py` reports which layer is best
        features.append(slice_means(layer_BLD, objective.grid_of(batch))[0].numpy())
        videos.append(video)

    labels = {"label_N": np.array([v.label for v in videos])} if all(v.label for v in videos) else {}
    np.savez(arguments.out, features_ND=np.stack(features), path_N=np.array([v.path for v in videos]), **labels)
    print(f"{len(videos)} videos, {features[0].size} numbers each: {arguments.out}")


if __name__ == "__main__":
    main()
