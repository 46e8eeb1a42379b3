"""Settings of push_to_hub."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class PushToHub:
    """Upload the model of a run to the Hugging Face hub: weights, configuration, preprocessing, tokenizer and model card."""

    run: Path | None = None
    """Run folder of pretrain_ar, finetune, train_tokenizer or fit_tokenizer, or the folder `model` in it."""
    repo: str = ""
    """Id on the hub, owner/name. You must have logged in with `hf auth login`."""
    private: bool = True
    """Make a new repository private. An existing one stays as it is."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("run must name the run to upload")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) is None:
            raise ValueError(f"repo must be owner/name, got {self.repo!r}")
