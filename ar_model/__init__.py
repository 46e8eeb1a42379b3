"""Transformer, objectives and probes. `load_objective(folder)` returns a pre-trained model with a method `features(batch)`."""

from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2, VIMPAC, ARVideo, Objective, VideoMAE, load_objective

__all__ = ["MAM2", "VIMPAC", "ARVideo", "CodeSpec", "Objective", "VideoMAE", "load_objective"]
