"""Python code that uses the model of a run on a video, in any working folder."""

from pathlib import Path


def features_snippet(folder: Path) -> str:
    """Return the code that computes the features of a video, for a run folder of pretrain_ar."""
    return f"""from pipelines.inference import load_model
features = load_model({str(folder.resolve())!r}).features("video.mp4")
features.tokens  # (layers, tokens, width)
features.pooled  # (layers, width)"""


def classes_snippet(folder: Path) -> str:
    """Return the code that classifies a video, for a run folder of finetune."""
    return f"""from pipelines.inference import load_model
load_model({str(folder.resolve())!r}).predict("video.mp4")  # {{class: probability}}"""
