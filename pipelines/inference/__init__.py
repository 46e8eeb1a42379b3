"""Use of trained models on videos: `load_model(RUN).features("video.mp4")`, `load_model(RUN).predict("video.mp4")`."""

from pipelines.inference.video_model import Features, VideoClassifier, VideoModel, load_model

__all__ = ["Features", "VideoClassifier", "VideoModel", "load_model"]
