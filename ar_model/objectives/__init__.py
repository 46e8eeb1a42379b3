"""Pre-training objectives, each a composition of what is seen x input x trunk x target."""

import json
from pathlib import Path

from ar_model.objectives.arvideo import ARVideo
from ar_model.objectives.base import Objective

__all__ = ["OBJECTIVES", "ARVideo", "Objective", "load_objective"]

OBJECTIVES: dict[str, type[Objective]] = {cls.__name__: cls for cls in (ARVideo,)}


def load_objective(folder: Path, *, trained: bool = True) -> Objective:
    """The model in a folder written by `save_pretrained`, in evaluation mode.

    With `trained` false it is the same network, newly initialised.

    Raises:
        ValueError: if there is none.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        cls = OBJECTIVES[config["objective"]]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder}: holds no pre-trained model ({type(error).__name__}: {error})") from None
    return (cls.load(folder) if trained else cls.from_config(config)).eval()
