"""Use of pre-trained models on videos: `load_model(RUN).features("video.mp4")`."""

from pipelines.inference.video_model import Features, VideoModel, load_model

__all__ = ["Features", "VideoModel", "load_model"]
