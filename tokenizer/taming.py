"""VQGANs of taming-transformers (arXiv 2012.09841) in the layout they are published in, frame by frame.

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
from types import ModuleType
from typing import Any

import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.base import VideoTokenizer, hash_module, to_float, to_uint8

QUANTIZERS = {
    "taming.models.vqgan.VQModel": ("VectorQuantizer2", "VectorQuantizer"),
    "taming.models.vqgan.VQNoDiscModel": ("VectorQuantizer2", "VectorQuantizer"),
    "taming.models.vqgan.GumbelVQ": ("GumbelQuantize",),
}
"""Which quantizers of the package the codes of a model can come from; the first is what the package itself uses."""

WEIGHTS = "weights.safetensors"
"""What `python -m tokenizer.convert` writes beside a checkpoint."""

_YAML_BYTES = 2**16


class TamingTokenizer(VideoTokenizer):
    """Encoder, quantizer and decoder of the package, applied to every frame alone.

    Args:
        quantizer: `VectorQuantizer2` (in its legacy form), `VectorQuantizer` (the one before it, which multiplies
            one-hot vectors) or `GumbelQuantize`.
        n_embed: vectors of the codebook.
        embed_dim: channels of each vector.
        ddconfig: of encoder and decoder, as the project YAML has it.

    Raises:
        ValueError: if the package is not installed.
    """

    causal = False
    levels = None
    context = (0, 0)

    def __init__(self, *, quantizer: str, n_embed: int, embed_dim: int, ddconfig: Mapping[str, Any]) -> None:
        super().__init__()
        networks, quantizers = _package()
        with contextlib.redirect_stdout(io.StringIO()):  # the decoder announces its size there
            self.encoder = networks.Encoder(**ddconfig)
            self.decoder = networks.Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self._gumbel = quantizer == "GumbelQuantize"
        if self._gumbel:
            self.quantize = quantizers.GumbelQuantize(embed_dim, embed_dim, n_embed=n_embed)
        elif quantizer == "VectorQuantizer":
            self.quantize = quantizers.VectorQuantizer(n_embed, embed_dim, beta=0.25)
        else:
            self.quantize = quantizers.VectorQuantizer2(n_embed, embed_dim, beta=0.25, legacy=True)
        side = 2 ** (len(ddconfig["ch_mult"]) - 1)
        self.stride = (1, side, side)
        self.vocab_size = n_embed
        self.name = f"taming-{'gumbel-' if self._gumbel else ''}f{side}-{n_embed}"
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in ddconfig.items()}
        self._architecture = {"class": type(self).__name__, "quantizer": quantizer, **plain}

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        """One frame at a time: its codes are the same in any clip and batch, and memory is that of one frame."""
        grid_thw = self.codes_shape(*pixels_BTHWC.shape[1:4])
        codes_Bthw = torch.empty((len(pixels_BTHWC), *grid_thw), dtype=torch.int64, device=pixels_BTHWC.device)
        for codes_hw, pixels_HWC in zip(codes_Bthw.flatten(0, 1), pixels_BTHWC.flatten(0, 1), strict=True):
            codes_hw.copy_(self._codes(rearrange(to_float(pixels_HWC), "h w c -> 1 c h w").contiguous()))
        return codes_Bthw

    def _codes(self, frame_1CHW: Tensor) -> Tensor:
        z_1Dhw = self.quant_conv(self.encoder(frame_1CHW))
        with torch.autocast(z_1Dhw.device.type, enabled=False):
            if self._gumbel:
                # The package's forward adds Gumbel noise even in evaluation: its codes would differ from call to call.
                return self.quantize.proj(z_1Dhw.float()).argmax(1)[0]
            _, _, (_, _, codes) = self.quantize(z_1Dhw.float())
        return codes.view(z_1Dhw.shape[2:])

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        clips, frames, h, w = codes_Bthw.shape
        _, side, _ = self.stride
        pixels_BTHWC = codes_Bthw.new_empty((clips, frames, h * side, w * side, 3), dtype=torch.uint8)
        for pixels_HWC, codes_hw in zip(pixels_BTHWC.flatten(0, 1), codes_Bthw.flatten(0, 1), strict=True):
            vectors_1Dhw = self.quantize.get_codebook_entry(
                codes_hw.flatten().long(), (1, h, w, self._vectors.shape[1])
            )
            frame_1CHW = self.decoder(self.post_quant_conv(vectors_1Dhw))
            pixels_HWC.copy_(to_uint8(rearrange(frame_1CHW, "1 c h w -> h w c")))
        return pixels_BTHWC

    @property
    def _vectors(self) -> Tensor:
        return (self.quantize.embed if self._gumbel else self.quantize.embedding).weight

    def codebook(self) -> Tensor:
        """The vectors of the codes, (V, D)."""
        return self._vectors.detach()

    def fingerprint(self) -> str:
        """Hash of the quantizer's name, the configuration of the networks, and the weights."""
        return hash_module(self, self._architecture)


def load_taming(folder: Path, quantizer: str | None = None) -> TamingTokenizer:
    """A published VQGAN: `model.yaml` or `...project.yaml`, there or in `configs`; `.ckpt`, there or in `checkpoints`.

    Args:
        folder: with both in it.
        quantizer: a name in `QUANTIZERS` that the model can have; by default what the package uses today.

    Raises:
        ValueError: in one line that names the file, if that is not what lies there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, or a file")
    architecture = read_project(_find_project(folder), quantizer)
    file = _find_weights(folder)
    weights = _read_weights(file, folder)
    with torch.device("meta"):  # a YAML may declare anything: nothing is allocated before it fits the file of weights
        tokenizer = TamingTokenizer(**architecture)
    _compare(file, tokenizer.state_dict(), weights)
    own = {k: v.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for k, v in weights.items()}
    for key, tensor in own.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} holds values that are not finite")
    tokenizer.load_state_dict(own, assign=True)
    return tokenizer.freeze()


def _package() -> tuple[ModuleType, ModuleType]:
    """Its modules that need nothing but torch; `taming.models` needs pytorch-lightning and is never imported."""
    try:
        from taming.modules.diffusionmodules import model
        from taming.modules.vqvae import quantize

        quantize.VectorQuantizer2, quantize.GumbelQuantize  # noqa: B018  # early versions of the package lack them
    except (ImportError, AttributeError):
        raise ValueError(
            "a VQGAN needs the package taming-transformers-rom1504: pip install --no-deps taming-transformers-rom1504"
        ) from None
    return model, quantize


# --- the folder


def find_checkpoint(folder: Path) -> Path:
    """The Lightning checkpoint of a folder; `last.ckpt` if there are others.

    Raises:
        ValueError: if there is none, or no saying which.
    """
    return _the_one(folder, _files(folder, "checkpoints", ".ckpt"), lambda name: name == "last.ckpt", ".ckpt")


def _find_weights(folder: Path) -> Path:
    converted = [file for file in _files(folder, "checkpoints", ".safetensors") if file.name == WEIGHTS]
    return _the_one(folder, converted, lambda name: False, WEIGHTS) if converted else find_checkpoint(folder)


def _find_project(folder: Path) -> Path:
    files = _files(folder, "configs", ".yaml")
    return _the_one(folder, files, lambda name: name == "model.yaml" or name.endswith("project.yaml"), "project .yaml")


def _files(folder: Path, below: str, suffix: str) -> list[Path]:
    found = (file for place in (folder, folder / below) if place.is_dir() for file in place.iterdir())
    return sorted(file for file in found if file.suffix == suffix and file.is_file())


def _the_one(folder: Path, files: Sequence[Path], prefer: Callable[[str], bool], what: str) -> Path:
    chosen = [file for file in files if prefer(file.name)] or files
    if not chosen:
        raise ValueError(f"{folder}: no {what} in it")
    if len(chosen) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in chosen)
        raise ValueError(f"{folder}: which {what} is meant? There are {names}")
    return chosen[0]


# --- the project YAML

_Rule = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int, step: int = 1) -> _Rule:
    text = f"a whole number from {low} to {high}" + (f", a multiple of {step}" if step > 1 else "")
    return lambda value: type(value) is int and low <= value <= high and value % step == 0, text


def _wholes(low: int, high: int, shortest: int) -> _Rule:
    one, text = _whole(low, high)
    return (
        lambda v: isinstance(v, list) and shortest <= len(v) <= 12 and all(map(one, v)),
        f"a list of which each is {text}",
    )


def _only(wanted: object, why: str = "") -> _Rule:
    return lambda value: type(value) is type(wanted) and value == wanted, f"{wanted!r}{why}"


_DDCONFIG: dict[str, _Rule] = {
    "double_z": _only(False),
    "z_channels": _whole(1, 2**16),
    "resolution": _whole(1, 2**16),
    "in_channels": _only(3),
    "out_ch": _only(3),
    "ch": _whole(32, 2**12, step=32),
    "ch_mult": _wholes(1, 64, shortest=1),
    "num_res_blocks": _whole(1, 32),
    "attn_resolutions": _wholes(1, 2**16, shortest=0),
    "dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0, below 1"),
    "resamp_with_conv": (lambda value: type(value) is bool, "true or false"),
}
_PARAMS: dict[str, _Rule] = {
    "embed_dim": _whole(1, 2**16),
    "n_embed": _whole(2, 2**24),
    "ddconfig": (lambda value: isinstance(value, dict), "a mapping"),
    "remap": _only(None, ": codes renumbered by a file are not supported"),
}
_OPTIONAL = {"dropout", "resamp_with_conv", "remap"}
_OF_TRAINING = {
    *("lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "sane_index_shape"),
    *("kl_weight", "temperature_scheduler_config"),
}
"""Fields that decide neither codes nor pixels."""


def read_project(file: Path, quantizer: str | None) -> dict[str, Any]:
    """The arguments of `TamingTokenizer` that a project YAML stands for.

    Raises:
        ValueError: for a model that is not one of `QUANTIZERS`, a field that is unknown, missing or out of its bounds,
            or a quantizer that the model cannot have.
    """
    if file.stat().st_size > _YAML_BYTES:
        raise ValueError(f"{file}: larger than any project file ({_YAML_BYTES} bytes)")
    try:
        project = yaml.safe_load(file.read_text("utf-8"))
    except Exception as error:  # a damaged value makes the parser fail with any type
        raise ValueError(f"{file}: is no YAML of plain values: {_one_line(error)}") from None
    model = project.get("model") if isinstance(project, dict) else None
    model = model if isinstance(model, dict) else {}
    target = model.get("target")
    if not isinstance(target, str) or target not in QUANTIZERS:
        raise ValueError(f"{file}: model.target is {_shown(target)}, expected one of {', '.join(QUANTIZERS)}")
    params = _checked(file, "model.params", model.get("params"), _PARAMS, _OF_TRAINING)
    ddconfig = _checked(file, "model.params.ddconfig", params["ddconfig"], _DDCONFIG, set())
    possible = QUANTIZERS[target]
    if quantizer is not None and quantizer not in possible:
        raise ValueError(f"{file}: a {target} has no quantizer {quantizer!r}, but {' or '.join(possible)}")
    if possible == ("GumbelQuantize",) and params["embed_dim"] != ddconfig["z_channels"]:
        raise ValueError(f"{file}: embed_dim and z_channels of a GumbelVQ must be equal")
    return {
        "quantizer": quantizer or possible[0],
        "n_embed": params["n_embed"],
        "embed_dim": params["embed_dim"],
        "ddconfig": ddconfig,
    }


def _checked(file: Path, where: str, found: Any, rules: dict[str, _Rule], ignored: set[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {where} is {_shown(found)}, expected a mapping")
    for name in found:
        if name not in rules and name not in ignored:
            raise ValueError(f"{file}: {where} has an unknown field {_shown(name)}")
    for name, (fits, text) in rules.items():
        if name not in found and name not in _OPTIONAL:
            raise ValueError(f"{file}: {where} lacks {name}, {text}")
        if name in found and not fits(found[name]):
            raise ValueError(f"{file}: {where}.{name} is {_shown(found[name])}, expected {text}")
    return {name: found[name] for name in rules if name in found}


def _shown(value: object) -> str:
    """A value of a foreign file, never the whole of a large one: aliases can make that endless."""
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**12):
        return repr(value)
    return f"a {type(value).__name__}"


# --- the weights


def _read_weights(file: Path, folder: Path) -> dict[str, Tensor]:
    """The state of the networks, not copied from the file yet; what belongs to the training loss is left out."""
    try:
        state = load_file(file) if file.suffix == ".safetensors" else load_weights_only(file)["state_dict"]
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"Unpickler error:\s*(.*)", str(error))
        what = repr(found[1])[1:-1] if found else _one_line(error)
        raise ValueError(
            f"{file} holds more than weights ({what}): convert it once with python -m tokenizer.convert {folder}"
        ) from None
    except Exception as error:
        reason, _, _ = _one_line(error).partition(". ")  # after it torch gives advice, some of it dangerous
        raise ValueError(f"{file}: holds no weights that can be read: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{file}: its state_dict is not one of tensors by name")
    return {key: value for key, value in state.items() if not key.startswith("loss.") and key != "colorize"}


def load_weights_only(file: Path) -> dict[str, Any]:
    """What a Lightning checkpoint holds, mapped from the file, not read yet.

    Raises:
        pickle.UnpicklingError: if there is more in it than weights and plain values.
        Exception: of any other type if it is damaged.
    """
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then refuses
            checkpoint = torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        if zipped:
            raise
        raise ValueError("it is no zip archive, as torch has written since 1.6, and holds more than weights") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError("there is no state_dict in it")
    return checkpoint


def _compare(file: Path, expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    for key, tensor in found.items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_floating_point():
            raise ValueError(f"{file}: {_shown(key)} is no tensor of numbers")
    shapes = {k: (tuple(v.shape), tuple(expected[k].shape)) for k, v in found.items() if k in expected}
    differences = {
        "lacks": [key for key in expected if key not in found],
        "holds unknown": [_shown(key)[1:-1] for key in found if key not in expected],
        "has in another shape": [f"{k} {a} instead of {b}" for k, (a, b) in shapes.items() if a != b],
    }
    texts = [f"{what} {_first(keys)}" for what, keys in differences.items() if keys]
    if texts:
        raise ValueError(f"{file}: does not fit the project file: it {'; it '.join(texts)}")
    declared = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in found.values())
    if declared > file.stat().st_size:  # one number can be declared to fill a tensor of any size
        raise ValueError(f"{file}: declares {declared} bytes of weights, but has {file.stat().st_size}")


def _first(keys: Sequence[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__} {text}".strip()
