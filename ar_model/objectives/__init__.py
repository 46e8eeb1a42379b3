"""Pre-training objectives. Each module describes the visible tokens, input, model and target of one objective."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ar_model.objectives.arvideo import ARVideo
from ar_model.objectives.base import Objective
from ar_model.objectives.mam2 import MAM2
from ar_model.objectives.videomae import VideoMAE
from ar_model.objectives.vimpac import VIMPAC
from ar_model.weights import check_weights, read_config

__all__ = ["INVALID", "MAM2", "OBJECTIVES", "VIMPAC", "ARVideo", "Objective", "VideoMAE", "load_objective"]

OBJECTIVES: dict[str, type[Objective]] = {cls.__name__: cls for cls in (ARVideo, VideoMAE, VIMPAC, MAM2)}

INVALID = (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
"""Exceptions that a configuration of other types or sizes causes."""


def load_objective(folder: str | Path, *, trained: bool = True) -> Objective:
    """Load a pre-trained model, on the CPU and in evaluation mode.

        objective = load_objective("runs/RUN")
        with torch.inference_mode():
            layers = objective.features({"codes_BTHW": codes_BTHW})  # (B, L, D) for each block

    Args:
        folder: run folder of pretrain_ar, or a folder that `Objective.save` wrote, such as `model/` or a snapshot of a run.
        trained: False keeps new random parameters, as a baseline. Buffers, such as a tokenizer's codebook, are loaded anyway.

    Raises a ValueError if the folder holds no model, or the model cannot be read. The configuration is compared with the weights
    before anything large is built.
    """
    folder = Path(folder)
    if (folder / "model").is_dir():
        folder = folder / "model"
    try:
        config, file = read_config(folder / "config.json"), folder / "model.safetensors"
        if "classes" in config:
            raise ValueError("it is a classifier")
        cls = OBJECTIVES[config.pop("objective")]
        check_weights(lambda: cls.from_config(config), file)
        objective = cls.from_config(config)
        weights = load_file(file)
        new = {} if trained else dict(objective.named_parameters())
        objective.load_state_dict({k: v for k, v in weights.items() if k not in new}, strict=trained)
    except (*INVALID, OSError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{folder}: holds no pre-trained model that can be read ({reason})") from None
    return objective.eval()
