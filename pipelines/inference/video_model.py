"""Features and classes of videos from a trained model.

Legend: B clips, T H W C frames, height, width, colours, t h w grid of tokens, S layers, L tokens, D width.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from ar_model.classifier import Classifier, is_classifier, load_classifier
from ar_model.inputs import Grid
from ar_model.objectives import Objective, load_objective
from data.cache.layout import valid_slices
from data.clips import clip_of_file, clip_of_frames
from data.text import one_line
from pipelines.engine.encoding import Encoder
from pipelines.engine.preprocessing import Preprocessing, load_tokenizer_of, model_folder, preprocessing_of
from tokenizer import VideoTokenizer


@dataclass(frozen=True)
class Features:
    """Features of one clip.

    `tokens`: output of every block, first to last, (layers, tokens, width), fp32, on the device of the model. The last t * h * w
    tokens are those of the clip in raster order, with (t, h, w) = `grid`; VIMPAC has a clip token before them.
    """

    tokens: Tensor
    grid: Grid

    @property
    def pooled(self) -> Tensor:
        """Mean of the tokens of the clip in each layer, (layers, width)."""
        return self.tokens[:, -math.prod(self.grid) :].mean(1)

    @property
    def slices(self) -> Tensor:
        """Mean token of each time slice in each layer, (layers, time slices, width)."""
        return self.tokens[:, -math.prod(self.grid) :].unflatten(1, (self.grid[0], -1)).mean(2)


_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessing.json",
    "tokenizer/config.json",
    "tokenizer/model.safetensors",
)
"""Files of a model on the hub that are fetched."""


class VideoModel:
    """A trained model with its tokenizer and the clips of its training, see `load_model`."""

    def __init__(self, objective: Objective, preprocessing: Preprocessing, tokenizer: VideoTokenizer | None) -> None:
        """Put the parts together. `tokenizer` is needed if the model reads codes."""
        self.objective, self.tokenizer, self.preprocessing = objective.eval(), tokenizer, preprocessing
        # Only the canonical view is read, which is not augmented.
        self.clip = replace(preprocessing.clip, views=1, flip=False, scales=None)

    @property
    def device(self) -> torch.device:
        return next(self.objective.parameters()).device

    def to(self, device: str | torch.device) -> "VideoModel":
        """Move the model and its tokenizer to a device."""
        self.objective.to(device)
        if self.tokenizer is not None:
            self.tokenizer.to(device)
        return self

    def features(self, video: str | Path | np.ndarray | Tensor, rate: float | None = None) -> Features:
        """Return the features of the canonical clip of a video, from its middle, as `tokenize` cuts and encodes it.

        Args:
            video: path of a video file, or frames in memory, uint8 (frames, height, width, 3) in RGB, of any length and size.
            rate: frames per second of frames in memory; needed if the clips of the training have a frame rate.

        Raises:
            FileNotFoundError: if there is no such file.
            DamagedVideo: if the file cannot be used.
            ValueError: if frames in memory are of another type or shape, or lack a rate.
        """
        return self.features_of_batch(self.batch_of(video, rate))[0]

    def batch_of(self, video: str | Path | np.ndarray | Tensor, rate: float | None = None) -> dict[str, Tensor]:
        """Return the batch of the canonical clip of a video. Raises the same errors as `features`."""
        if isinstance(video, str | Path):
            pixels_THWC, view = clip_of_file(video, self.clip)
        else:
            pixels_THWC, view = clip_of_frames(np.asarray(video), self.clip, rate)
        return self.batch(torch.from_numpy(pixels_THWC)[None], np.array([view.real]))

    @torch.inference_mode()
    def features_of_batch(self, batch: dict[str, Tensor]) -> list[Features]:
        """Return the features of each clip of a batch of the objective, see `Objective`, on the device of the model."""
        layers_SBLD = torch.stack(self.objective.features(batch))
        grid = self.objective.grid_of(batch)
        return [Features(tokens_SLD, grid) for tokens_SLD in layers_SBLD.unbind(1)]

    def batch(self, pixels_BTHWC: Tensor, valid_B: np.ndarray) -> dict[str, Tensor]:
        """Return the input of the objective for clips of the size of `self.clip`, uint8 (B, T, H, W, 3).

        `valid_B`: number of valid frames of each clip. The others repeat the last valid frame.
        """
        if self.objective.sees_pixels:
            return {"pixels_BTHWC": pixels_BTHWC.to(self.device)}
        assert self.tokenizer is not None
        encoder = Encoder(self.tokenizer, self.preprocessing.encode_batch, self.preprocessing.precision)
        codes_BTHW = encoder.clips(pixels_BTHWC)
        slices_B = valid_slices(valid_B, pixels_BTHWC.shape[1], codes_BTHW.shape[1])
        return {"codes_BTHW": codes_BTHW, "slices_B": torch.from_numpy(slices_B).to(self.device)}


class VideoClassifier(VideoModel):
    """A fine-tuned classifier with its tokenizer and the clips of its training, see `load_model`."""

    def __init__(self, classifier: Classifier, preprocessing: Preprocessing, tokenizer: VideoTokenizer | None) -> None:
        """Put the parts together. `tokenizer` is needed if the model reads codes."""
        super().__init__(classifier.trunk, preprocessing, tokenizer)
        self.classifier, self.classes = classifier.eval(), classifier.classes

    def to(self, device: str | torch.device) -> "VideoClassifier":
        self.classifier.to(device)
        super().to(device)
        return self

    @torch.inference_mode()
    def predict(self, video: str | Path | np.ndarray | Tensor, rate: float | None = None) -> dict[str, float]:
        """Return the probability of each class, the most probable one first, for the canonical clip of a video.

        Arguments and errors are those of `features`.
        """
        logits_C = self.classifier.logits(self.batch_of(video, rate))[0]
        share_C = logits_C.float().softmax(0)
        return {self.classes[i]: share_C[i].item() for i in share_C.argsort(descending=True, stable=True).tolist()}


def load_model(folder: str | Path, *, tokenizer: str | None = None, trust: bool = False) -> VideoModel:
    """Load a pre-trained or fine-tuned model with its preprocessing, on the CPU and in evaluation mode.

        model = load_model("runs/RUN")
        features = model.features("video.mp4")
        features.tokens  # (layers, tokens, width)
        features.pooled  # (layers, width)

    A run of finetune is a `VideoClassifier`, which also has `predict`:

        load_model("runs/RUN").predict("video.mp4")  # {class: probability}

    Args:
        folder: run folder of pretrain_ar or finetune, or the folder `model` in it, wherever it is now; or an id on the Hugging
            Face hub, owner/name, from which only files of these names are fetched.
        tokenizer: place of the tokenizer, if it is neither in the folder nor where it was.
        trust: allow a tokenizer that contains code, such as TorchScript.

    Raises:
        ValueError: if the folder holds no model, or its preprocessing or its tokenizer cannot be read.
    """
    folder = _fetched(str(folder)) if _is_hub_id(str(folder)) else Path(folder)
    model = model_folder(folder)
    classifier = load_classifier(model) if is_classifier(model) else None
    objective = load_objective(model) if classifier is None else classifier.trunk
    preprocessing = preprocessing_of(folder)
    reads_codes = not objective.sees_pixels
    own = load_tokenizer_of(model, preprocessing, tokenizer, trust=trust) if reads_codes else None
    if classifier is not None:
        return VideoClassifier(classifier, preprocessing, own)
    return VideoModel(objective, preprocessing, own)


def _is_hub_id(place: str) -> bool:
    """Return whether a text is an id on the hub, owner/name, and no folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", place) is not None and place[0] != "." and not Path(place).parent.is_dir()


def _fetched(hub_id: str) -> Path:
    """Return the folder of a model from the hub. Raises ValueError if it cannot be fetched."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_FILES)))
    except OSError as error:
        raise ValueError(
            f"{hub_id}: no such folder, and cannot be fetched from the hub: {one_line(error, 300)}"
        ) from None
