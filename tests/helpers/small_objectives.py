"""Small models of all objectives except ARVideo, and batches for them."""

import torch
from torch import Tensor

from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2, VIMPAC, VideoMAE

CODES = CodeSpec(shape=(4, 4, 4), vocab_size=40, levels=((8, 5),), clip=(8, 16, 16))
SIZE = {"width": 24, "depth": 2, "heads": 2}
MODELS = {
    "VideoMAE": lambda: VideoMAE(CODES, **SIZE, ratio=0.75, decoder_width=24, decoder_depth=1),
    "VIMPAC": lambda: VIMPAC(CODES, **SIZE, head_width=16),
    "VIMPAC, one row per code": lambda: VIMPAC(CODES, **SIZE, head_width=16, code_input="rows"),
    "MAM2": lambda: MAM2(CODES, **SIZE, ratio=0.75, align=1.0),
}


def batch_of(clips: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "codes_BTHW": torch.randint(40, (clips, 4, 4, 4), generator=draw),
        "pair_BTHW": torch.randint(40, (clips, 4, 4, 4), generator=draw),
        "pixels_BTHWC": torch.randint(256, (clips, 8, 16, 16, 3), generator=draw, dtype=torch.uint8),
        "seed_B": torch.arange(clips) + 100 * seed,
    }
