"""Settings of evaluate_tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.clip_spec import ClipSpec
from pipelines.settings import check_at_least_1, check_clip, recorded_in


@dataclass(kw_only=True)
class EvaluateTokenizer:
    """Evaluate tokenizers on the same held-out clips: a table, pictures and JSON."""

    tokenizers: list[str]
    """Run folders, save_pretrained folders, hub ids, taming:FOLDER, torchscript:FOLDER, or linear-TxHxW-GxV, which is fitted to
    the training videos. For a tokenizer that needs longer
    clips, the last frame is repeated; repeated frames are not evaluated."""
    trust: bool = False
    """Allow tokenizers and detectors that contain code, such as TorchScript."""
    videos: str = "builtin:moving-digits"
    """Folder, list file or builtin:moving-digits; only the videos that train_tokenizer holds out are used."""
    clip: ClipSpec = recorded_in("tokenizers", ClipSpec)
    """clips cut from each video; by default like those that the tokenizers were trained on, if all run folders agree"""
    clips: int = 96
    """Maximum number of held-out clips."""
    batch_size: int = 8
    """Clips per tokenizer call."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the tokenizers."""
    lpips: Path | None = None
    """Folder with vgg16-397923af.pth and vgg.pth; adds the perceptual distance LPIPS."""
    detector: Path | None = None
    """TorchScript file of the I3D network (i3d_torchscript.pt); adds rFVD. TorchScript contains code and needs --trust."""
    pretrain: int = 0
    """Seconds of pre-training on the codes of each tokenizer. The table then has probes of the trained and of the untrained
    network; the videos need labels. 0 trains nothing."""
    pretrain_seeds: int = 1
    """Number of seeds of the pre-training."""
    out: Path | None = None
    """Run folder; by default runs/evaluate_tokenizer-<hash of the settings>."""

    def __post_init__(self) -> None:
        if not self.tokenizers:
            raise ValueError("tokenizers must name at least one tokenizer, got none")
        check_at_least_1(self, "clips", "batch_size", "pretrain_seeds")
        if self.pretrain < 0:
            raise ValueError(f"pretrain must be at least 0 seconds, got {self.pretrain}")
        check_clip(self.videos, self.clip)
