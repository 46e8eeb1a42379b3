"""Python code that computes the features of a video with the model of a run."""

from pathlib import Path


def snippet(folder: Path) -> str:
    """Return the code for a run folder of pretrain_ar, which works in any working folder."""
    return f"""from pipelines.inference import load_model
features = load_model({str(folder.resolve())!r}).features("video.mp4")
features.tokens  # (layers, tokens, width)
features.pooled  # (layers, width)"""
