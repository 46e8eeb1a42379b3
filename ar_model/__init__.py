"""The transformer, its objectives and its probes. `load_objective` loads a pre-trained model."""

from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2, VIMPAC, ARVideo, Objective, VideoMAE, load_objective

__all__ = ["MAM2", "VIMPAC", "ARVideo", "CodeSpec", "Objective", "VideoMAE", "load_objective"]
