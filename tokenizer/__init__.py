"""Pixels <-> codes. `load_tokenizer` is the only door."""

import contextlib
import io
import json
from pathlib import Path

from tokenizer.base import VideoTokenizer
from tokenizer.vq3d import VQ3D

__all__ = ["VQ3D", "VideoTokenizer", "load_tokenizer"]


def load_tokenizer(source: str) -> VideoTokenizer:
    """Load a frozen tokenizer, in evaluation mode.

    Args:
        source: a run folder of train_tokenizer, a folder written by `save_pretrained`, or the id of one on the hub.

    Raises:
        ValueError: if that is no tokenizer.
    """
    folder = Path(source).expanduser()
    if (folder / "model").is_dir():
        folder = folder / "model"
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"{source}: is no tokenizer: no config.json in it")
    if not folder.exists() and (source.count("/") != 1 or source[0] in "./~" or folder.parent.is_dir()):
        raise ValueError(f"{source}: no such tokenizer folder")
    try:
        if folder.exists() and "objective" in json.loads((folder / "config.json").read_text()):
            raise ValueError("it is a pre-trained model")
        with contextlib.redirect_stdout(io.StringIO()):  # the hub mixin announces every load there
            tokenizer = VQ3D.from_pretrained(folder if folder.exists() else source, strict=True)
    except Exception as error:
        raise ValueError(
            f"{source}: does not load as a VQ3D tokenizer: {' '.join(str(error).split())[:300]}"
        ) from error
    return tokenizer.eval().requires_grad_(False)
