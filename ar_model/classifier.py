"""Classifier of videos: the encoder of an objective, fine-tuned with a linear head.

The head reads the mean of the clip's tokens after the last block, normalised (arXiv 2203.12602, appendix). Stochastic depth,
dropped tokens and mixed clips are for training only.

Legend: B clips, L tokens, M some of them, K tokens before the grid, D width, C classes, S blocks.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ar_model.augmentation import crop_and_flip
from ar_model.clusters import hashed, uniform
from ar_model.folds import shortened
from ar_model.inputs import take
from ar_model.model_card import classifier_card
from ar_model.objectives import INVALID, OBJECTIVES, Objective
from ar_model.weights import check_weights, read_config

_HEAD_STD = 2e-5
"""Standard deviation of the head's initial weights: the first predictions are nearly uniform."""
_MAX_CLASSES = 2**16
_MAX_CONFIG_BYTES = 2**24
"""Most bytes of the configuration, which has the names of all classes."""
_NAMED = 20
"""Classes that the model card names."""


class Classifier(nn.Module):
    """Classifier of clips. It takes the trunk over: the modules that only the trunk's loss uses are deleted.

    Args:
        trunk: objective whose encoder is fine-tuned.
        classes: names of the classes, in the order of the logits.
        drop_path: share of samples for which the last block is skipped in training; it rises linearly from 0 at the first
            block (stochastic depth, arXiv 1603.09382).
        keep_tokens: share of the tokens of a clip that training sees.
        smoothing: label smoothing.
        mixup: parameter of the beta distribution by which two clips of a batch and their labels are mixed in training
            (arXiv 1710.09412); 0 mixes nothing. Embeddings are mixed, which for pixels equals mixing the pixels.
        crop_scale: smallest share of the area of a frame that a random crop has in training; 1 crops nothing. Pixels only.
        flip: mirror half of the clips in training. Pixels only.

    Raises ValueError if a number is out of range, or class names are not distinct.
    """

    def __init__(
        self,
        trunk: Objective,
        classes: Sequence[str],
        *,
        drop_path: float = 0.0,
        keep_tokens: float = 1.0,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        crop_scale: float = 1.0,
        flip: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= len(set(classes)) == len(classes) <= _MAX_CLASSES:
            raise ValueError(f"classes must be 2 to {_MAX_CLASSES} distinct names, got {len(classes)}")
        if len(json.dumps(list(classes))) > _MAX_CONFIG_BYTES // 2:
            raise ValueError(f"the names of the classes must have at most {_MAX_CONFIG_BYTES // 2} bytes together")
        for name, value in (("drop_path", drop_path), ("smoothing", smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        for name, value in (("keep_tokens", keep_tokens), ("crop_scale", crop_scale)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
        if not 0 <= mixup <= 100:
            raise ValueError(f"mixup must be from 0 to 100, got {mixup}")
        if not trunk.sees_pixels and (crop_scale < 1 or flip):
            raise ValueError(
                "crop_scale must be 1 and flip false for a model that reads codes: cache cropped views instead"
            )
        trunk.drop_loss()
        self.trunk, self.classes = trunk, tuple(classes)
        self.drop_path, self.keep_tokens, self.smoothing, self.mixup = drop_path, keep_tokens, smoothing, mixup
        self.crop_scale, self.flip = crop_scale, flip
        self.norm = nn.LayerNorm(trunk.width, eps=1e-6)
        self.head = nn.Linear(trunk.width, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `loss` (cross-entropy in nats) and `accuracy` of a batch of the trunk with `label_B`, int64 class numbers."""
        label_B, share = batch["label_B"], 1.0
        if self.training and (self.crop_scale < 1 or self.flip):
            cropped = crop_and_flip(batch["pixels_BTHWC"], batch["seed_B"], self.crop_scale, self.flip)
            batch = {**batch, "pixels_BTHWC": cropped}
        if self.training and self.mixup > 0:
            # The training loop has seeded the generator with the seed and the step.
            share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        logits_BC = self.logits(batch, share).float()
        smoothing = self.smoothing if self.training else 0.0
        loss = F.cross_entropy(logits_BC, label_B, label_smoothing=smoothing)
        if share < 1:
            mixed = F.cross_entropy(logits_BC, label_B.flip(0), label_smoothing=smoothing)
            loss = share * loss + (1 - share) * mixed
        return {"loss": loss, "accuracy": (logits_BC.argmax(1) == label_B).float().mean().detach()}

    def logits(self, batch: dict[str, Tensor], share: float = 1.0) -> Tensor:
        """Return the class logits, (B, C). `share`: share of a clip in its mixture with the clip at the batch's other end."""
        tokens = self.trunk.embed(batch)
        leading = tokens.x_BLD.shape[1] - _tokens_of_grid(self.trunk, batch)
        x_BLD = tokens.x_BLD if share == 1 else share * tokens.x_BLD + (1 - share) * tokens.x_BLD.flip(0)
        rotation, path_S2B = tokens.rotation(), None
        if self.training and self.keep_tokens < 1:
            kept_BM = self._kept(batch["seed_B"], x_BLD.shape[1], leading)
            x_BLD, rotation = take(x_BLD, kept_BM), tokens.rotation(kept_BM)
        if self.training and self.drop_path > 0:
            path_S2B = self._paths(batch["seed_B"])
        last_BLD = self.trunk.encoder(x_BLD, rotation=rotation, path_S2B=path_S2B)[-1]
        return self.head(self.norm(last_BLD[:, leading:].mean(1)))

    def _kept(self, seed_B: Tensor, count: int, leading: int) -> Tensor:
        """Return the indices of the tokens that training sees, (B, M): all leading ones, and a random share of the others."""
        tokens = count - leading
        chosen_BM = hashed(seed_B, tokens, stream=6).argsort(1)[:, : max(1, round(self.keep_tokens * tokens))]
        first_BK = torch.arange(leading, device=seed_B.device).expand(len(seed_B), -1)
        return torch.cat([first_BK, chosen_BM.sort(1).values + leading], dim=1)

    def _paths(self, seed_B: Tensor) -> Tensor:
        """Return the factors of the two branches of each block, (S, 2, B): 0, or the inverse of the share that is kept."""
        blocks = len(self.trunk.encoder.blocks)
        rate_S = torch.linspace(0, self.drop_path, blocks, device=seed_B.device)
        drawn_S2B = uniform(seed_B, 2 * blocks, stream=7).T.unflatten(0, (blocks, 2))
        rate_S11 = rate_S[:, None, None]
        return (drawn_S2B >= rate_S11) / (1 - rate_S11)

    def layers(self) -> list[list[nn.Parameter]]:
        """Return all parameters by their depth: the input, each block, and the head."""
        blocks = [list(block.parameters()) for block in self.trunk.encoder.blocks]
        head = [*self.norm.parameters(), *self.head.parameters()]
        deeper = {parameter for layer in (*blocks, head) for parameter in layer}
        return [[parameter for parameter in self.parameters() if parameter not in deeper], *blocks, head]

    def save(self, folder: Path, training: Mapping[str, object] | None = None) -> None:
        """Write `model.safetensors` and `config.json`, for `load_classifier`, and README.md, the model card.

        `training`: facts of the training by name, for the model card.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {"objective": type(self.trunk).__name__, **self.trunk.config(), "classes": list(self.classes)}
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        facts = {**self.trunk.sizes(), "classes": shortened(self.classes, _NAMED), **(training or {})}
        classifier_card(self, facts).save(folder / "README.md")


def _tokens_of_grid(trunk: Objective, batch: dict[str, Tensor]) -> int:
    t, h, w = trunk.grid_of(batch)
    return t * h * w


def _from_config(config: dict[str, Any]) -> Classifier:
    """Build a newly initialised classifier from a saved configuration."""
    settings = {key: value for key, value in config.items() if key not in ("objective", "classes")}
    return Classifier(OBJECTIVES[config["objective"]].from_config(settings), [str(name) for name in config["classes"]])


def is_classifier(folder: Path) -> bool:
    """Return whether the folder of a model holds a classifier, as far as its configuration tells."""
    try:
        return "classes" in read_config(folder / "config.json", _MAX_CONFIG_BYTES)
    except (OSError, ValueError):
        return False


def load_classifier(folder: str | Path) -> Classifier:
    """Load a fine-tuned classifier, on the CPU and in evaluation mode.

        classifier = load_classifier("RUN")
        logits_BC = classifier.logits({"codes_BTHW": codes_BTHW})  # the order of classifier.classes

    `pipelines.inference.load_model` loads it with its tokenizer and its clips, for videos.

    Args:
        folder: run folder of finetune, or the folder `model` in it.

    Raises a ValueError if the folder holds no classifier, or it cannot be read.
    """
    folder = Path(folder)
    if (folder / "model").is_dir():
        folder = folder / "model"
    try:
        config, file = read_config(folder / "config.json", _MAX_CONFIG_BYTES), folder / "model.safetensors"
        check_weights(lambda: _from_config(config), file)
        classifier = _from_config(config)
        classifier.load_state_dict(load_file(file))
    except (*INVALID, OSError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{folder}: holds no classifier that can be read ({reason})") from None
    return classifier.eval()
