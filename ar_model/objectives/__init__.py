"""Pre-training objectives, each a composition of what is seen x input x trunk x target."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ar_model.objectives.arvideo import ARVideo
from ar_model.objectives.base import Objective
from ar_model.objectives.mam2 import MAM2
from ar_model.objectives.videomae import VideoMAE
from ar_model.objectives.vimpac import VIMPAC

__all__ = ["MAM2", "OBJECTIVES", "VIMPAC", "ARVideo", "Objective", "VideoMAE", "load_objective"]

OBJECTIVES: dict[str, type[Objective]] = {cls.__name__: cls for cls in (ARVideo, VideoMAE, VIMPAC, MAM2)}


def load_objective(folder: Path, *, trained: bool = True) -> Objective:
    """The model in a folder written by `save`, in evaluation mode.

    With `trained` false it is the same network newly initialised; what is no parameter, such as a tokenizer's codebook, it keeps.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        objective = OBJECTIVES[config.pop("objective")].from_config(config)
        weights = load_file(folder / "model.safetensors")
        if trained:
            objective.load_state_dict(weights, strict=True)
        else:
            parameters = dict(objective.named_parameters())
            objective.load_state_dict({k: v for k, v in weights.items() if k not in parameters}, strict=False)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{folder}: holds no pre-trained model that can be read ({reason})") from None
    return objective.eval()
