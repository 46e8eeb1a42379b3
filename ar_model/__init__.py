"""Transformer, objectives and probes. `load_objective(folder)` loads a pre-trained model, `objective.features(batch)` uses it."""

from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2, VIMPAC, ARVideo, Objective, VideoMAE, load_objective

__all__ = ["MAM2", "VIMPAC", "ARVideo", "CodeSpec", "Objective", "VideoMAE", "load_objective"]
