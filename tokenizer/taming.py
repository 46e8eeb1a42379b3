"""VQGANs of taming-transformers (arXiv 2012.09841), loaded from their published files and applied to single frames.

Legend: B clips, T H W C frames, height, width, colours; h w the grid of codes of a frame; V codes, D channels of a code.
"""

import contextlib
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.base import VideoTokenizer, hash_module, to_float, to_uint8
from tokenizer.messages import NEEDS_TAMING, first_sentence, one_line, show, show_name

QUANTIZERS = {
    "taming.models.vqgan.VQModel": ("VectorQuantizer2", "VectorQuantizer"),
    "taming.models.vqgan.VQNoDiscModel": ("VectorQuantizer2", "VectorQuantizer"),
    "taming.models.vqgan.GumbelVQ": ("GumbelQuantize",),
}
"""Possible quantizers of each model class. The first is the one that the current package uses."""

WEIGHTS = "weights.safetensors"
"""File that `python -m tokenizer.convert` writes next to a checkpoint."""

_YAML_BYTES = 2**16
"""Size limit of a project file, in bytes."""


class TamingTokenizer(VideoTokenizer):
    """Encoder, quantizer and decoder of taming-transformers, applied to each frame separately.

    Args:
        quantizer: `VectorQuantizer2` (with legacy=True), `VectorQuantizer` (its predecessor, which multiplies one-hot
            vectors with the codebook) or `GumbelQuantize`.
        n_embed: vocabulary size.
        embed_dim: channels of a code.
        ddconfig: settings of encoder and decoder, as in the project YAML.

    Raises:
        ValueError: if the package is not installed.
    """

    context = (0, 0)

    def __init__(self, *, quantizer: str, n_embed: int, embed_dim: int, ddconfig: Mapping[str, Any]) -> None:
        super().__init__()
        # These modules need only torch; `taming.models` needs pytorch-lightning and is never imported.
        try:
            from taming.modules.diffusionmodules.model import Decoder, Encoder
            from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer, VectorQuantizer2
        except ImportError:
            raise ValueError(f"a VQGAN {NEEDS_TAMING}") from None
        # The constructor of the decoder prints its size.
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self._gumbel = quantizer == "GumbelQuantize"
        if self._gumbel:
            self.quantize = GumbelQuantize(embed_dim, embed_dim, n_embed=n_embed)
        elif quantizer == "VectorQuantizer":
            self.quantize = VectorQuantizer(n_embed, embed_dim, beta=0.25)
        else:
            self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=0.25, legacy=True)
        side = 2 ** (len(ddconfig["ch_mult"]) - 1)
        self.stride = (1, side, side)
        self.vocab_size = n_embed
        self.name = f"taming-{'gumbel-' if self._gumbel else ''}f{side}-{n_embed}"
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in ddconfig.items()}
        self._architecture = {"class": type(self).__name__, "quantizer": quantizer, **plain}

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        """Encode one frame at a time, so that codes do not depend on the batch and peak memory is that of one frame."""
        grid_thw = self.codes_shape(*pixels_BTHWC.shape[1:4])
        codes_Bthw = torch.empty((len(pixels_BTHWC), *grid_thw), dtype=torch.int64, device=pixels_BTHWC.device)
        for codes_hw, pixels_HWC in zip(codes_Bthw.flatten(0, 1), pixels_BTHWC.flatten(0, 1), strict=True):
            codes_hw.copy_(self._codes(rearrange(to_float(pixels_HWC), "h w c -> 1 c h w").contiguous()))
        return codes_Bthw

    def _codes(self, frame_1CHW: Tensor) -> Tensor:
        z_1Dhw = self.quant_conv(self.encoder(frame_1CHW))
        with torch.autocast(z_1Dhw.device.type, enabled=False):
            # `forward` of the package adds Gumbel noise also in evaluation mode, so codes would differ between calls.
            if self._gumbel:
                return self.quantize.proj(z_1Dhw.float()).argmax(1)[0]
            _, _, (_, _, codes) = self.quantize(z_1Dhw.float())
        return codes.view(z_1Dhw.shape[2:])

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        clips, frames, h, w = codes_Bthw.shape
        _, side, _ = self.stride
        pixels_BTHWC = codes_Bthw.new_empty((clips, frames, h * side, w * side, 3), dtype=torch.uint8)
        shape_1hwD = (1, h, w, self.codebook().shape[1])
        for pixels_HWC, codes_hw in zip(pixels_BTHWC.flatten(0, 1), codes_Bthw.flatten(0, 1), strict=True):
            vectors_1Dhw = self.quantize.get_codebook_entry(codes_hw.flatten().long(), shape_1hwD)
            frame_1CHW = self.decoder(self.post_quant_conv(vectors_1Dhw))
            pixels_HWC.copy_(to_uint8(rearrange(frame_1CHW, "1 c h w -> h w c")))
        return pixels_BTHWC

    def codebook(self) -> Tensor:
        return (self.quantize.embed if self._gumbel else self.quantize.embedding).weight.detach()

    def fingerprint(self) -> str:
        return hash_module(self, self._architecture)


def load_taming(folder: Path, quantizer: str | None = None) -> TamingTokenizer:
    """Load a published VQGAN, frozen.

    Args:
        folder: folder with `model.yaml` or `...project.yaml` (there or in `configs`), and the `.ckpt` or
            `weights.safetensors` (there or in `checkpoints`).
        quantizer: one of the model's names in `QUANTIZERS`; default: the first.

    Raises:
        ValueError: if a file is missing or invalid; the message names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, or not a folder")
    architecture = read_project(_find_project(folder), quantizer)
    file = _find_weights(folder)
    weights = _read_weights(file, folder)
    # The YAML file may declare any size, so memory is allocated only after its shapes match the weights.
    with torch.device("meta"):
        tokenizer = TamingTokenizer(**architecture)
    _compare(file, tokenizer.state_dict(), weights)
    # The tensors are memory-mapped; copies do not depend on the file.
    copies = {k: v.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for k, v in weights.items()}
    for key, tensor in copies.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} holds values that are not finite")
    tokenizer.load_state_dict(copies, assign=True)
    return tokenizer.freeze()


# --- files of the folder


def find_checkpoint(folder: Path) -> Path:
    """Return the Lightning checkpoint of a folder, or `last.ckpt` if there are several.

    Raises:
        ValueError: if there is no checkpoint, or there are several but no `last.ckpt`.
    """
    files = _files(folder, "checkpoints", ".ckpt")
    return _single(folder, [file for file in files if file.name == "last.ckpt"] or files, ".ckpt")


def _find_weights(folder: Path) -> Path:
    converted = [file for file in _files(folder, "checkpoints", ".safetensors") if file.name == WEIGHTS]
    return _single(folder, converted, WEIGHTS) if converted else find_checkpoint(folder)


def _find_project(folder: Path) -> Path:
    files = _files(folder, "configs", ".yaml")
    preferred = [file for file in files if file.name == "model.yaml" or file.name.endswith("project.yaml")]
    return _single(folder, preferred or files, "project .yaml")


def _files(folder: Path, subfolder: str, suffix: str) -> list[Path]:
    """Return all files with a suffix in a folder and in one of its subfolders, sorted."""
    files = [*folder.glob(f"*{suffix}"), *(folder / subfolder).glob(f"*{suffix}")]
    return sorted(file for file in files if file.suffix == suffix and file.is_file())


def _single(folder: Path, files: Sequence[Path], kind: str) -> Path:
    if len(files) == 1:
        return files[0]
    names = ", ".join(str(file.relative_to(folder)) for file in files)
    raise ValueError(f"{folder}: expected one {kind}, found {names or 'none'}")


# --- the project YAML

_Rule = tuple[Callable[[Any], bool], str]
"""Test of a value, and a description of valid values."""


def _integer(low: int, high: int, step: int = 1) -> _Rule:
    text = f"an integer from {low} to {high}" + (f", a multiple of {step}" if step > 1 else "")
    return lambda value: type(value) is int and low <= value <= high and value % step == 0, text


def _integers(low: int, high: int, shortest: int) -> _Rule:
    fits, text = _integer(low, high)
    return (
        lambda value: isinstance(value, list) and shortest <= len(value) <= 12 and all(map(fits, value)),
        f"a list of {shortest} to 12 items, each {text}",
    )


def _only(expected: object, reason: str = "") -> _Rule:
    return lambda value: type(value) is type(expected) and value == expected, f"{expected!r}{reason}"


_DDCONFIG: dict[str, _Rule] = {
    "double_z": _only(False),
    "z_channels": _integer(1, 2**16),
    "resolution": _integer(1, 2**16),
    "in_channels": _only(3),
    "out_ch": _only(3),
    "ch": _integer(32, 2**12, step=32),
    "ch_mult": _integers(1, 64, shortest=1),
    "num_res_blocks": _integer(1, 32),
    "attn_resolutions": _integers(1, 2**16, shortest=0),
    "dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0, below 1"),
    "resamp_with_conv": (lambda value: type(value) is bool, "true or false"),
}
_PARAMS: dict[str, _Rule] = {
    "embed_dim": _integer(1, 2**16),
    "n_embed": _integer(2, 2**24),
    "ddconfig": (lambda value: isinstance(value, dict), "a mapping"),
    "remap": _only(None, ": codes renumbered by a file are not supported"),
}
_OPTIONAL = {"dropout", "resamp_with_conv", "remap"}
_IGNORED = {
    *("lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "sane_index_shape"),
    *("kl_weight", "temperature_scheduler_config"),
}
"""Fields for training, which change neither codes nor pixels."""


def read_project(file: Path, quantizer: str | None) -> dict[str, Any]:
    """Return the arguments of `TamingTokenizer` for a project YAML.

    Raises:
        ValueError: if the model is not in `QUANTIZERS`, a field is unknown, missing or out of range, or the model cannot
            have the quantizer.
    """
    if file.stat().st_size > _YAML_BYTES:
        raise ValueError(f"{file}: a project file must have at most {_YAML_BYTES} bytes, got {file.stat().st_size}")
    try:
        project = yaml.safe_load(file.read_text("utf-8"))
    # The parser raises exceptions of many types for invalid values.
    except Exception as error:
        raise ValueError(f"{file}: not a YAML file of plain values: {one_line(error)}") from None
    model = project.get("model") if isinstance(project, dict) else None
    if not isinstance(model, dict):
        model = {}
    target = model.get("target")
    if not isinstance(target, str) or target not in QUANTIZERS:
        raise ValueError(f"{file}: model.target is {show(target)}, expected one of {', '.join(QUANTIZERS)}")
    params = _checked(file, "model.params", model.get("params"), _PARAMS, _IGNORED)
    ddconfig = _checked(file, "model.params.ddconfig", params["ddconfig"], _DDCONFIG, set())
    possible = QUANTIZERS[target]
    if quantizer is not None and quantizer not in possible:
        raise ValueError(f"{file}: {target} has no quantizer {quantizer!r}, expected {' or '.join(possible)}")
    if possible == ("GumbelQuantize",) and params["embed_dim"] != ddconfig["z_channels"]:
        raise ValueError(f"{file}: embed_dim and z_channels of a GumbelVQ must be equal")
    sizes = {name: params[name] for name in ("n_embed", "embed_dim")}
    return {"quantizer": quantizer or possible[0], **sizes, "ddconfig": ddconfig}


def _checked(file: Path, path: str, fields: Any, rules: dict[str, _Rule], ignored: set[str]) -> dict[str, Any]:
    """Return the fields that have rules. Raises ValueError for a missing, unknown or invalid field."""
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: {path} is {show(fields)}, expected a mapping")
    for name in fields:
        if name not in rules and name not in ignored:
            raise ValueError(f"{file}: {path} has an unknown field {show(name)}")
    for name, (fits, text) in rules.items():
        if name not in fields and name not in _OPTIONAL:
            raise ValueError(f"{file}: {path} lacks {name}, {text}")
        if name in fields and not fits(fields[name]):
            raise ValueError(f"{file}: {path}.{name} is {show(fields[name])}, expected {text}")
    return {name: fields[name] for name in rules if name in fields}


# --- the weights


def _read_weights(file: Path, folder: Path) -> dict[str, Tensor]:
    """Return the memory-mapped state dict of the networks, without the weights of the training loss."""
    try:
        state = load_file(file) if file.suffix == ".safetensors" else load_weights_only(file)["state_dict"]
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"Unpickler error:\s*(.*)", str(error))
        culprit = repr(match[1])[1:-1] if match else one_line(error)
        advice = f"convert it once with python -m tokenizer.convert {folder}"
        raise ValueError(f"{file} holds more than weights ({culprit}): {advice}") from None
    except Exception as error:
        raise ValueError(f"{file}: its weights cannot be read: {first_sentence(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{file}: its state_dict is not a mapping of names to tensors")
    return {key: value for key, value in state.items() if not key.startswith("loss.") and key != "colorize"}


def load_weights_only(file: Path) -> dict[str, Any]:
    """Load a Lightning checkpoint; its tensors are memory-mapped.

    Raises:
        pickle.UnpicklingError: if it holds more than weights and plain values.
        Exception: of any type if the file is damaged.
    """
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            # torch warns about content that it then refuses.
            warnings.simplefilter("ignore")
            checkpoint = torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        if zipped:
            raise
        raise ValueError("not a zip archive (written before torch 1.6), and it holds more than weights") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError("it has no state_dict")
    return checkpoint


def _compare(file: Path, expected: Mapping[str, Tensor], weights: Mapping[str, Any]) -> None:
    """Raise ValueError unless the weights have the expected names and shapes."""
    for key, tensor in weights.items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_floating_point():
            raise ValueError(f"{file}: {show(key)} is not a dense floating-point tensor")
    shapes = {k: (tuple(v.shape), tuple(expected[k].shape)) for k, v in weights.items() if k in expected}
    differences = {
        "lacks": [key for key in expected if key not in weights],
        "holds unknown": [show_name(key) for key in weights if key not in expected],
        "has other shapes:": [f"{k} {a} instead of {b}" for k, (a, b) in shapes.items() if a != b],
    }
    texts = [f"{verb} {_first(keys)}" for verb, keys in differences.items() if keys]
    if texts:
        raise ValueError(f"{file}: does not fit the project file: it {'; it '.join(texts)}")
    # A small file can declare a tensor of any size with stride 0.
    declared = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in weights.values())
    if declared > file.stat().st_size:
        raise ValueError(f"{file}: declares {declared} bytes of weights, but has {file.stat().st_size}")


def _first(keys: Sequence[str], count: int = 3) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
