"""Loading of tokenizers of all kinds."""

import contextlib
import io
import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from tokenizer.base import VideoTokenizer
from tokenizer.linear import Linear
from tokenizer.messages import one_line
from tokenizer.taming import TamingTokenizer, load_taming
from tokenizer.torchscript import TorchScriptTokenizer, load_torchscript
from tokenizer.vq3d import VQ3D
from tokenizer.weights import check_weights, read_config

__all__ = ["VQ3D", "Linear", "TamingTokenizer", "TorchScriptTokenizer", "VideoTokenizer", "load_tokenizer"]


def load_tokenizer(source: str, *, trust: bool = False, download: bool = True) -> VideoTokenizer:
    """Load a tokenizer, in evaluation mode and frozen.

    Args:
        source: for a VQ3D or a linear tokenizer, a run folder of train_tokenizer or fit_tokenizer, a folder written by
            `save_pretrained`, or an id on the Hugging Face hub. For a VQGAN of taming-transformers, `taming:FOLDER`;
            `?quantizer=VectorQuantizer` after it selects the older of the package's quantizers. For a folder with encoder.jit and
            decoder.jit, `torchscript:FOLDER`.
        trust: allow code in the files to run. A TorchScript file contains code.
        download: allow a hub id to be fetched. Without it, only what was fetched before is loaded.

    Raises:
        ValueError: if the source is not a valid tokenizer.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind == "taming":
        folder, chosen, quantizer = rest.partition("?quantizer=")
        return load_taming(Path(os.path.expanduser(folder)), quantizer if chosen else None)
    if colon and kind == "torchscript":
        return load_torchscript(Path(os.path.expanduser(rest)), trust)
    if re.match(r"\w*:", source) and not Path(source).exists():
        expected = "a folder, a hub id, taming:FOLDER or torchscript:FOLDER"
        raise ValueError(f"{source}: unknown kind of tokenizer {kind!r}; expected {expected}")
    return _load_own(source, download).freeze()


def _load_own(source: str, download: bool) -> VQ3D | Linear:
    folder = Path(os.path.expanduser(source))
    if (folder / "model").is_dir():
        folder = folder / "model"
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"{source}: not a tokenizer: there is no config.json")
    is_path = source.count("/") != 1 or source[0] in "./~" or folder.parent.is_dir()
    if not folder.exists() and is_path:
        raise ValueError(f"{source}: no such tokenizer folder")
    try:
        if not folder.exists():
            folder = _fetched(source, download)
        config = read_config(folder / "config.json")
        if "objective" in config:
            raise ValueError("it is a pre-trained ARVideo model")
        kind = Linear if str(config.get("name")).startswith("linear-") else VQ3D
        check_weights(kind, config, folder / "model.safetensors")
        # The hub mixin prints a line for every load.
        with contextlib.redirect_stdout(io.StringIO()):
            return kind.from_pretrained(folder, strict=True)
    except Exception as error:
        raise ValueError(f"{source}: does not load as a tokenizer of arvideo: {one_line(error)}") from error


def _fetched(hub_id: str, download: bool) -> Path:
    """Return the folder of a model from the hub. Raises ValueError if it must be fetched without `download`."""
    try:
        files = ["config.json", "model.safetensors"]
        return Path(snapshot_download(hub_id, allow_patterns=files, local_files_only=not download))
    except LocalEntryNotFoundError:
        if download:
            raise
        raise ValueError("no such folder, and no model of this name was fetched from the hub before") from None
