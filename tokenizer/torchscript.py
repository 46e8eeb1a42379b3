"""Encoder and decoder exported as TorchScript, as the discrete video tokenizers of Cosmos are (arXiv 2501.03575).

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

_CONFIG_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files do not say of themselves; `config.json` has these fields and no others.

    Raises:
        ValueError: for a value that is of another type, or out of its bounds.
    """

    stride: tuple[int, int, int]
    """Pixels of one code along (t, h, w)."""
    vocab_size: int
    levels: tuple[int, ...] | None
    """Values of each digit of a code, lowest first; null if codes have no digits."""
    causal: bool
    """Whether clips have 1 + k * stride frames."""

    def __post_init__(self) -> None:
        if not _whole_numbers(self.stride, 1) or len(self.stride) != 3:
            raise ValueError("stride must be three whole numbers (t, h, w) of 1 or more")
        if not _whole_numbers([self.vocab_size], 2):
            raise ValueError("vocab_size must be a whole number of 2 or more")
        if self.levels is not None and (
            not _whole_numbers(self.levels, 2) or math.prod(self.levels) != self.vocab_size
        ):
            raise ValueError(f"levels must be null, or whole numbers whose product is vocab_size, {self.vocab_size}")
        if not isinstance(self.causal, bool):
            raise ValueError("causal must be true or false")


def _whole_numbers(values: Any, low: int) -> bool:
    return isinstance(values, list | tuple) and all(type(v) is int and low <= v < 2**31 for v in values)


class TorchScriptTokenizer(VideoTokenizer):
    """Two programs: `encoder` gives codes first, `decoder` takes them. They run as they were exported, in their own type.

    Args:
        encoder: video (B, 3, T, H, W) in [-1, 1] -> codes (B, t, h, w), alone or first in a tuple.
        decoder: codes -> video.
        facts: what is known of them otherwise.
        fingerprint: of the files.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, facts: Facts, fingerprint: str) -> None:
        super().__init__()
        # The first of all parameters, empty: it tells the device also if the files hold constants only.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self.encoder, self.decoder = encoder, decoder
        self.stride, self.vocab_size = facts.stride, facts.vocab_size
        self.levels, self.causal = facts.levels, facts.causal
        self.name = f"torchscript-{'x'.join(map(str, facts.stride))}-{facts.vocab_size}"
        self._fingerprint = fingerprint
        self._code_type = torch.int64

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        """Checks what the program gives.

        Raises:
            ValueError: for codes of another type or grid than declared, or not in the vocabulary.
        """
        video_BCTHW = rearrange(to_float(pixels_BTHWC), "b t h w c -> b c t h w").contiguous()
        codes_Bthw = _run(self.encoder, video_BCTHW.to(_float_type(self.encoder)))
        if isinstance(codes_Bthw, tuple | list) and codes_Bthw:
            codes_Bthw = codes_Bthw[0]
        kind = codes_Bthw.dtype if isinstance(codes_Bthw, Tensor) else type(codes_Bthw).__name__
        if kind not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(f"the encoder of {self.name} gives {kind}, not codes (those of a continuous tokenizer?)")
        expected = (len(pixels_BTHWC), *self.codes_shape(*pixels_BTHWC.shape[1:4]))
        if codes_Bthw.shape != expected:
            raise ValueError(
                f"the encoder of {self.name} makes codes of shape {tuple(codes_Bthw.shape)} of pixels of shape "
                f"{tuple(pixels_BTHWC.shape)}; its stride {self.stride} would make {expected}"
            )
        if codes_Bthw.numel() and not 0 <= codes_Bthw.amin() <= codes_Bthw.amax() < self.vocab_size:
            raise ValueError(
                f"the encoder of {self.name} gives codes from {int(codes_Bthw.amin())} to {int(codes_Bthw.amax())}, "
                f"which are not of a vocabulary of {self.vocab_size}"
            )
        self._code_type = codes_Bthw.dtype
        return codes_Bthw.long()

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        """Checks what the program gives.

        Raises:
            ValueError: for a video of another shape than declared.
        """
        video_BCTHW = _run(self.decoder, codes_Bthw.to(self._code_type))
        clips, t, h, w = codes_Bthw.shape
        expected = (clips, 3, self.frames_of(t), h * self.stride[1], w * self.stride[2])
        shape = tuple(video_BCTHW.shape) if isinstance(video_BCTHW, Tensor) else type(video_BCTHW).__name__
        if shape != expected:
            raise ValueError(
                f"the decoder of {self.name} makes {shape} of codes of shape {tuple(codes_Bthw.shape)}; "
                f"its stride {self.stride} would make {expected}"
            )
        return to_uint8(rearrange(video_BCTHW, "b c t h w -> b t h w c"))

    def codebook(self) -> None:
        """None: of codes without digits nothing more is known."""

    def fingerprint(self) -> str:
        """Hash of the bytes of both files and of the declared facts."""
        return self._fingerprint


def _float_type(module: nn.Module) -> torch.dtype:
    states = (tensor.dtype for tensor in chain(module.parameters(), module.buffers()) if tensor.is_floating_point())
    return next(states, torch.float32)


def _run(module: nn.Module, x: Tensor) -> Any:
    # Optimized execution may fuse kernels after the first calls: codes would depend on how many came before.
    with torch.autocast(x.device.type, enabled=False), torch.jit.optimized_execution(False):
        return module(x)


def load_torchscript(folder: Path, trust: bool) -> TorchScriptTokenizer:
    """`encoder.jit` and `decoder.jit`, with a `config.json` beside them unless the folder's name is one of Cosmos'.

    Args:
        folder: with these files in it.
        trust: whether its programs may run; without, none of their bytes are looked at.

    Raises:
        ValueError: in one line that names the file, if they may not, or are not what they are declared to be.
    """
    files = [folder / "encoder.jit", folder / "decoder.jit"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    if not trust:
        raise ValueError(
            f"{files[0]} is a program; it runs when it is loaded: pass --trust if you trust where it comes from"
        )
    facts = _read_facts(folder)
    digest = hashlib.sha256(json.dumps(asdict(facts), sort_keys=True).encode())
    modules: list[nn.Module] = []
    for file in files:
        data = file.read_bytes()  # what is hashed is what is loaded, whatever happens to the file meanwhile
        digest.update(hashlib.sha256(data).digest())
        try:
            modules.append(torch.jit.load(io.BytesIO(data), map_location="cpu"))
        except Exception as error:
            raise ValueError(f"{file}: does not load as TorchScript: {_one_line(error).partition('. ')[0]}") from None
    encoder, decoder = modules
    tokenizer = TorchScriptTokenizer(encoder, decoder, facts, digest.hexdigest()).freeze()
    try:
        _try(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: is not what it is declared to be: {error}") from None
    return tokenizer


def _read_facts(folder: Path) -> Facts:
    file = folder / "config.json"
    cosmos = re.search(r"DV(4x8x8|8x8x8|8x16x16)(?!\d)", os.path.basename(os.path.abspath(folder)))
    if cosmos:  # the config.json that Cosmos publishes says nothing of the codes
        t, h, w = map(int, cosmos[1].split("x"))
        return Facts(stride=(t, h, w), vocab_size=64000, levels=(8, 8, 8, 5, 5, 5), causal=True)
    if not file.exists():
        raise ValueError(
            f"{folder}: nothing says what its codes are: write a config.json with stride, vocab_size, levels, causal"
        )
    try:
        if not file.is_file() or file.stat().st_size > _CONFIG_BYTES:
            raise ValueError("no file, or a very large one")
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict) or set(found) != set(Facts.__annotations__):
            raise ValueError(f"it must have exactly the fields {', '.join(Facts.__annotations__)}")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        return Facts(**fields)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {_one_line(error)}") from None


@torch.no_grad()
def _try(tokenizer: TorchScriptTokenizer) -> None:
    """Encode and decode the two shortest clips, small ones, or larger ones if those are too small for the programs.

    Raises:
        ValueError: if one is not encoded or decoded as declared.
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
        except Exception as error:  # a program raises what it likes
            failures.append(f"{lengths} frames of {size[1]}x{size[2]}: {_one_line(error)}")
    raise ValueError(f"it does not take clips of {failures[0]}")


def _one_line(error: Exception) -> str:
    """The end of what TorchScript says is its point; before it comes where in the program."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"
