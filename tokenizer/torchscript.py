"""Tokenizers exported as TorchScript, such as the discrete video tokenizers of Cosmos (arXiv 2501.03575).

Legend: B clips, T H W C frames, height, width, colours; t h w the grid of codes.
"""

import hashlib
import io
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer.base import VideoTokenizer, to_float, to_uint8
from tokenizer.messages import first_sentence, one_line, require_trust

_CONFIG_BYTES = 2**16
"""Size limit of config.json."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Properties of the codes that TorchScript files do not contain; `config.json` has exactly these fields.

    Raises:
        ValueError: if a value has the wrong type or is out of range.
    """

    stride: tuple[int, int, int]
    """Pixels per code along (t, h, w)."""
    vocab_size: int
    levels: tuple[int, ...] | None
    """Number of values of each digit of a code, lowest digit first; null if codes have no digits."""
    causal: bool
    """True if the first frame has its own codes. Clips then have 1 + k * stride frames."""

    def __post_init__(self) -> None:
        if not _integers(self.stride, 1) or len(self.stride) != 3:
            raise ValueError("stride must be three integers (t, h, w) of at least 1")
        if not _integers([self.vocab_size], 2):
            raise ValueError("vocab_size must be an integer of at least 2")
        if self.levels is not None and (not _integers(self.levels, 2) or math.prod(self.levels) != self.vocab_size):
            raise ValueError(f"levels must be null, or integers whose product is vocab_size, {self.vocab_size}")
        if not isinstance(self.causal, bool):
            raise ValueError("causal must be true or false")


def _integers(values: Any, low: int) -> bool:
    """Return whether values are a list or tuple of integers in [low, 2^31)."""
    return isinstance(values, list | tuple) and all(type(v) is int and low <= v < 2**31 for v in values)


class TorchScriptTokenizer(VideoTokenizer):
    """Two TorchScript programs, an encoder and a decoder, which run in the dtype in which they were exported.

    Args:
        encoder: video (B, 3, T, H, W) in [-1, 1] -> codes (B, t, h, w), alone or first in a tuple.
        decoder: codes (B, t, h, w) -> video (B, 3, T, H, W) in [-1, 1].
        fingerprint: hash of the files and the facts.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, facts: Facts, fingerprint: str) -> None:
        super().__init__()
        # Callers read the device from the first parameter. The programs may have no parameters, only constants.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self.encoder, self.decoder = encoder, decoder
        self.stride, self.vocab_size = facts.stride, facts.vocab_size
        self.levels, self.causal = None if facts.levels is None else (facts.levels,), facts.causal
        self.name = f"torchscript-{'x'.join(map(str, facts.stride))}-{facts.vocab_size}"
        self._fingerprint = fingerprint
        self._code_type = torch.int64

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        """Run the encoder and check its codes.

        Raises:
            ValueError: if the codes are not integers, have another shape than declared, or are outside the vocabulary.
        """
        video_BCTHW = rearrange(to_float(pixels_BTHWC), "b t h w c -> b c t h w").contiguous()
        codes_Bthw = _run(self.encoder, video_BCTHW.to(_float_type(self.encoder)))
        if isinstance(codes_Bthw, tuple | list) and codes_Bthw:
            codes_Bthw = codes_Bthw[0]
        kind = codes_Bthw.dtype if isinstance(codes_Bthw, Tensor) else type(codes_Bthw).__name__
        subject = f"the encoder of {self.name} returns"
        if kind not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(f"{subject} {kind}, expected integer codes (is it a continuous tokenizer?)")
        expected = (len(pixels_BTHWC), *self.codes_shape(*pixels_BTHWC.shape[1:4]))
        if codes_Bthw.shape != expected:
            shapes = f"{tuple(codes_Bthw.shape)} for pixels of shape {tuple(pixels_BTHWC.shape)}; expected {expected}"
            raise ValueError(f"{subject} codes of shape {shapes} by its stride {self.stride}")
        if codes_Bthw.numel() and not 0 <= codes_Bthw.amin() <= codes_Bthw.amax() < self.vocab_size:
            limits = f"from {int(codes_Bthw.amin())} to {int(codes_Bthw.amax())}"
            raise ValueError(f"{subject} codes {limits}, outside its vocabulary of {self.vocab_size}")
        self._code_type = codes_Bthw.dtype
        return codes_Bthw.long()

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        """Run the decoder and check the shape of its video.

        Raises:
            ValueError: if the video has another shape than declared.
        """
        video_BCTHW = _run(self.decoder, codes_Bthw.to(self._code_type))
        clips, t, h, w = codes_Bthw.shape
        expected = (clips, 3, self.frames_of(t), h * self.stride[1], w * self.stride[2])
        shape = tuple(video_BCTHW.shape) if isinstance(video_BCTHW, Tensor) else type(video_BCTHW).__name__
        if shape != expected:
            result = f"{shape} for codes of shape {tuple(codes_Bthw.shape)}; expected {expected}"
            raise ValueError(f"the decoder of {self.name} returns {result} by its stride {self.stride}")
        return to_uint8(rearrange(video_BCTHW, "b c t h w -> b t h w c"))

    def codebook(self) -> None:
        """Return None, since the files do not contain the vectors of codes."""

    def fingerprint(self) -> str:
        return self._fingerprint


def _float_type(module: nn.Module) -> torch.dtype:
    states = (tensor.dtype for tensor in chain(module.parameters(), module.buffers()) if tensor.is_floating_point())
    return next(states, torch.float32)


def _run(module: nn.Module, x: Tensor) -> Any:
    # Optimized execution may fuse kernels after the first calls, so codes could depend on the number of calls.
    with torch.autocast(x.device.type, enabled=False), torch.jit.optimized_execution(False):
        return module(x)


def load_torchscript(folder: Path, trust: bool) -> TorchScriptTokenizer:
    """Load `encoder.jit` and `decoder.jit`, frozen.

    Args:
        folder: folder with both files, and with a `config.json` unless the folder has the name of a Cosmos tokenizer.
        trust: allow the programs to run. If False, the files are not read.

    Raises:
        ValueError: if `trust` is False, if a file is missing or invalid, or if the programs do not work as declared.
    """
    files = [folder / "encoder.jit", folder / "decoder.jit"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    require_trust(files[0], trust)
    facts = _read_facts(folder)
    digest = hashlib.sha256(json.dumps(asdict(facts), sort_keys=True).encode())
    modules: list[nn.Module] = []
    for file in files:
        # The file is read once, so that the hash is that of the loaded bytes.
        data = file.read_bytes()
        digest.update(hashlib.sha256(data).digest())
        try:
            modules.append(torch.jit.load(io.BytesIO(data), map_location="cpu"))
        except Exception as error:
            raise ValueError(f"{file}: does not load as TorchScript: {first_sentence(error)}") from None
    encoder, decoder = modules
    tokenizer = TorchScriptTokenizer(encoder, decoder, facts, digest.hexdigest()).freeze()
    try:
        _try(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: does not work as declared: {error}") from None
    return tokenizer


def _read_facts(folder: Path) -> Facts:
    file = folder / "config.json"
    cosmos = re.search(r"DV(4x8x8|8x8x8|8x16x16)(?!\d)", os.path.basename(os.path.abspath(folder)))
    # The published config.json of a Cosmos tokenizer does not describe the codes. The name of its folder does.
    if cosmos:
        t, h, w = map(int, cosmos[1].split("x"))
        return Facts(stride=(t, h, w), vocab_size=64000, levels=(8, 8, 8, 5, 5, 5), causal=True)
    if not file.exists():
        names = ", ".join(Facts.__annotations__)
        raise ValueError(f"{folder}: its codes are not described: write a config.json with {names}")
    try:
        if not file.is_file() or file.stat().st_size > _CONFIG_BYTES:
            raise ValueError(f"not a file, or larger than {_CONFIG_BYTES} bytes")
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict) or set(config) != set(Facts.__annotations__):
            raise ValueError(f"it must have exactly the fields {', '.join(Facts.__annotations__)}")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
        return Facts(**fields)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None


@torch.no_grad()
def _try(tokenizer: TorchScriptTokenizer) -> None:
    """Encode and decode clips of the two shortest lengths, and retry with larger frames if a program fails.

    Raises:
        ValueError: if a clip is not encoded or decoded as declared.
    """
    t, h, w = tokenizer.stride
    lengths = (1, 1 + t) if tokenizer.causal else (t, 2 * t)
    failures = []
    for height, width in ((64, 96), (256, 384)):
        clips = [(frames, -(-height // h) * h, -(-width // w) * w) for frames in lengths]
        try:
            for size in clips:
                noise = torch.randint(256, (1, *size, 3), generator=torch.Generator().manual_seed(0))
                tokenizer.decode(tokenizer.encode(noise.to(torch.uint8)))
            return
        except ValueError:
            raise
        # A program can raise exceptions of any type.
        except Exception as error:
            failures.append(f"{lengths} frames of {size[1]}x{size[2]}: {one_line(error)}")
    raise ValueError(f"it does not accept clips of {failures[0]}")
