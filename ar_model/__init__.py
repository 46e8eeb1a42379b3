"""Transformer, objectives, classifier and probes.

`load_objective(folder)` returns a pre-trained model with a method `features(batch)`, `load_classifier(folder)` a fine-tuned one.
"""

from ar_model.classifier import Classifier, load_classifier
from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2, VIMPAC, ARVideo, Objective, VideoMAE, load_objective

__all__ = [
    "MAM2",
    "VIMPAC",
    "ARVideo",
    "Classifier",
    "CodeSpec",
    "Objective",
    "VideoMAE",
    "load_classifier",
    "load_objective",
]
