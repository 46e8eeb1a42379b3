"""Settings of evaluate_tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.clips import ClipSpec


@dataclass(kw_only=True)
class EvaluateTokenizer:
    """Put any number of tokenizers through the same held-out clips: table, pictures, JSON."""

    tokenizers: list[str] = field(
        metadata={"help": "Run folders, save_pretrained folders, hub ids, taming:FOLDER, torchscript:FOLDER."}
    )
    trust: bool = False
    """Run tokenizers, and the detector, that are programs, as TorchScript is."""
    videos: str = "builtin:moving-digits"
    """Folder, list file, or builtin:moving-digits; of them those that train_tokenizer holds out."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """What a clip is; where a tokenizer takes longer ones only, the last frame is repeated, and left out of what is judged"""
    clips: int = 96
    """The most clips that are judged."""
    batch_size: int = 8
    """Clips that go through a tokenizer together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the tokenizers."""
    lpips: Path | None = None
    """Folder with vgg16-397923af.pth and vgg.pth: adds the perceptual distance LPIPS."""
    detector: Path | None = None
    """The I3D of FVD as TorchScript (i3d_torchscript.pt): adds rFVD. A program: needs --trust."""
    out: Path | None = None
    """Run folder; by default runs/evaluate_tokenizer-<hash of the settings>."""

    def __post_init__(self) -> None:
        if not self.tokenizers:
            raise ValueError("tokenizers is empty: name one at least")
        for name in ("clips", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.clip.views == "dense":
            raise ValueError("clip.views dense is for tokenize; judge tokenizers on the canonical view")
