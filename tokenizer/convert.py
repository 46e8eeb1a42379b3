"""python -m tokenizer.convert: The weights of a Lightning checkpoint that holds more than weights, as safetensors.

The pickle in the checkpoint is a program, which may call anything. Here its instructions are followed on paper: names are
noted, nothing is imported, called or built, and of the tensors only where their bytes lie is kept. (A `pickle_module` for
torch.load would not do: it runs a TorchScript program that was given the name of a checkpoint.)
"""

import argparse
import os
import pickletools
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tokenizer.taming import WEIGHTS, find_checkpoint, load_weights_only

NAME = "python -m tokenizer.convert"
INSTRUCTIONS = 2_000_000
"""More than any checkpoint's pickle has: a tensor takes about thirty."""

_TYPES = {
    f"torch.{name}Storage": getattr(torch, name.lower())
    for name in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
} | {"torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8}
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_DICTIONARY = "collections.OrderedDict"


# --- a pickle on paper


class _Name(str):
    """What would be imported: module and name."""


class _Pairs(list):
    """A dictionary as the keys and values that were put into it, in turn: no key is ever hashed."""


@dataclass(frozen=True)
class _Storage:
    """Bytes of the archive, as numbers of a type."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class _View:
    """What a tensor shows of a storage; nothing of it is checked yet."""

    storage: _Storage
    offset: Any
    size: Any
    stride: Any


_LEFT_OUT = object()
"""Stands for every value that is not needed: all that would be called, and lists and sets."""


class _PickleInterpreter:
    """Follows a pickle's instructions with stand-ins for everything but numbers, texts, tuples and dictionaries.

    `names` counts what it refers to beyond dictionaries and tensors.
    """

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[Any, Any] = {}

    def follow(self, pickle: bytes) -> Any:
        """The value that it ends with.

        Raises:
            ValueError: if it is damaged, or has more instructions than any checkpoint.
        """
        try:
            for count, (instruction, argument, _) in enumerate(pickletools.genops(pickle)):
                if count == INSTRUCTIONS:
                    raise ValueError(f"it has more than {INSTRUCTIONS} instructions")
                self._step(instruction.name, argument)
            (value,) = self._stack
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"its pickle is damaged: {error}") from None
        return value

    def _step(self, instruction: str, argument: Any) -> None:
        match instruction:
            case "PROTO" | "FRAME" | "STOP" | "READONLY_BUFFER":
                pass
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "POP" if not self._stack:
                self._marked()
            case "POP" | "APPEND" | "BUILD":
                self._taken(1)
            case "POP_MARK" | "APPENDS" | "ADDITEMS":
                self._marked()
            case "DUP":
                self._stack.append(self._stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "SETITEM":
                self._set(self._taken(2))
            case "SETITEMS":
                self._set(self._marked())
            case _:
                made = self._made(instruction, argument)
                self._stack.append(made)

    def _made(self, instruction: str, argument: Any) -> Any:
        """The value that an instruction puts on the stack."""
        match instruction:
            case "NEWTRUE" | "NEWFALSE":
                return instruction == "NEWTRUE"
            case "EMPTY_DICT":
                return _Pairs()
            case "DICT":
                return _paired(self._marked())
            case "EMPTY_TUPLE":
                return ()
            case "TUPLE":
                return tuple(self._marked())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self._taken(int(instruction[-1])))
            case "GLOBAL":
                return self._noted(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                return self._noted("{}.{}".format(*(n if isinstance(n, str) else "?" for n in self._taken(2))))
            case "REDUCE":
                return _called(*self._taken(2))
            case "BINPERSID":
                return _stored(*self._taken(1))
            case "EXT1" | "EXT2" | "EXT4":
                self._noted(f"extension {argument}")
            case "INST":
                self._noted(argument.replace(" ", ".", 1))
                self._marked()
            case "LIST" | "FROZENSET" | "OBJ":
                self._marked()
            case "NEWOBJ" | "NEWOBJ_EX":
                self._taken(2 if instruction == "NEWOBJ" else 3)
            case "EMPTY_LIST" | "EMPTY_SET" | "NEXT_BUFFER" | "PERSID":
                pass
            case _:  # the instruction is a number, a text, bytes or None
                return argument
        return _LEFT_OUT

    def _taken(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("its stack is empty")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _marked(self) -> list[Any]:
        marked, self._stack = self._stack, self._below.pop()
        return marked

    def _set(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], _Pairs):
            self._stack[-1].extend(_paired(items))

    def _noted(self, name: str) -> _Name:
        if name not in (*_TYPES, _TENSOR, _PARAMETER, _DICTIONARY):
            self.names[name] += 1
        return _Name(name)


def _paired(items: list[Any]) -> _Pairs:
    for key in items[::2]:
        if isinstance(key, tuple) and any(isinstance(item, tuple) for item in key):
            # Shared parts make it small in the file and endless to hash, as torch.load would.
            raise ValueError("a key of a dictionary is made of tuples of tuples")
    return _Pairs(items)


def _called(function: Any, arguments: Any) -> Any:
    """What a call stands for, if it makes a dictionary or a tensor."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        return _LEFT_OUT
    if function == _DICTIONARY and not arguments:
        return _Pairs()
    if function == _TENSOR and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
        return _View(*arguments[:4])
    if function == _PARAMETER and arguments and isinstance(arguments[0], _View):
        return arguments[0]
    return _LEFT_OUT


def _stored(reference: Any) -> Any:
    match reference:
        case ("storage", _Name() as kind, str(key), _, _) if kind in _TYPES:
            return _Storage(_TYPES[kind], key)
    return _LEFT_OUT


# --- the checkpoint


@dataclass(frozen=True)
class Found:
    """What is in a checkpoint."""

    tensors: dict[str, Tensor]
    """Of its `state_dict`."""
    left_out: list[str]
    """Its other parts, and what of its `state_dict` is no tensor."""
    names: Counter[str]
    """Classes and functions that it refers to, and how often."""


def read_checkpoint(file: Path) -> Found:
    """Its weights, without running anything of it.

    Raises:
        ValueError: in one line, if it is no checkpoint, is damaged, or declares more than it has.
        OSError: if it cannot be read.
    """
    try:
        if not file.is_file() or not zipfile.is_zipfile(file):
            raise ValueError("it is no zip archive, as torch has written since 1.6")
        with zipfile.ZipFile(file) as archive:
            return _Archive(archive, file.stat().st_size).read()
    except (ValueError, RuntimeError, OverflowError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: is no checkpoint that can be converted: {error}") from None


class _Archive:
    """The zip archive that torch.save writes: `<name>/data.pkl`, and `<name>/data/<key>` for each storage."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._size = archive, size
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        self._storages: dict[str, bytearray] = {}
        pickles = [name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} pickles in its archive, expected one")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in self._entries and self._bytes("byteorder") != sys.byteorder.encode():
            raise ValueError("it was written on a machine of another byte order")

    def read(self) -> Found:
        paper = _PickleInterpreter()
        parts = _dictionary(paper.follow(self._bytes("data.pkl")))
        state = parts.pop("state_dict", None)
        if not isinstance(state, _Pairs):
            raise ValueError("there is no state_dict in it")
        found = Found({}, list(parts), paper.names)
        room = self._size
        for key, value in _dictionary(state).items():
            if isinstance(value, _View):
                found.tensors[key] = tensor = self._tensor(key, value, room)
                room -= tensor.nbytes
            else:
                found.left_out.append(f"state_dict.{key}")
        if not found.tensors:
            raise ValueError("its state_dict has no tensors")
        return found

    def _tensor(self, key: str, view: _View, room: int) -> Tensor:
        """A copy of what the view shows; `room` is how many bytes it may have."""
        shape = (*_tuple(view.size), *_tuple(view.stride), view.offset)
        whole = all(type(number) is int and 0 <= number <= self._size for number in shape)
        if not whole or len(view.size) != len(view.stride):
            raise ValueError(f"the shape of {key} is no shape")
        if prod(view.size) * view.storage.dtype.itemsize > room:
            raise ValueError(f"{key} is declared larger than the file")
        if not prod(view.size):
            return torch.empty(view.size, dtype=view.storage.dtype)
        storage = self._storages.get(view.storage.key)
        if storage is None:
            storage = self._storages[view.storage.key] = bytearray(self._bytes(f"data/{view.storage.key}"))
            if sum(map(len, self._storages.values())) > self._size:
                raise ValueError("its storages overlap")
        last = view.offset + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
        if (last + 1) * view.storage.dtype.itemsize > len(storage):
            raise ValueError(f"{key} reaches beyond its storage")
        numbers = torch.frombuffer(storage, dtype=view.storage.dtype)
        return numbers.as_strided(view.size, view.stride, view.offset).clone(memory_format=torch.contiguous_format)

    def _bytes(self, name: str) -> bytes:
        entry = self._entries.get(self._folder + name)
        if entry is None:
            raise ValueError(f"{name} is not in its archive")
        if entry.compress_type != zipfile.ZIP_STORED or max(entry.file_size, entry.compress_size) > self._size:
            raise ValueError(f"{name} of its archive is compressed, or larger than the file")
        return self._archive.read(entry)


def _dictionary(value: Any) -> dict[str, Any]:
    """Pairs by those keys that are texts."""
    if not isinstance(value, _Pairs) or len(value) % 2:
        raise ValueError("there is no state_dict in it")
    return {key: item for key, item in zip(value[::2], value[1::2], strict=True) if isinstance(key, str)}


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (None,)


# --- the command


def write_weights(checkpoint: Path, tensors: dict[str, Tensor]) -> Path:
    """Write them beside the checkpoint; the file appears when it is whole.

    Raises:
        ValueError: if safetensors cannot write them.
        OSError: if the file cannot be put in its place.
    """
    file = checkpoint.parent / WEIGHTS
    temporary = file.with_name(f".{WEIGHTS}.{os.getpid()}")
    try:
        save_file(tensors, temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    """Convert and say what was found; exit code 2 and one line on stderr for what cannot be converted."""
    parser = _Parser(prog=NAME, description=f"{(__doc__ or '').partition(': ')[2].partition(chr(10))[0]}")
    text = f"checkpoint, or folder of a taming tokenizer; {WEIGHTS} is written beside the checkpoint"
    parser.add_argument("checkpoint", type=Path, metavar="FOLDER_OR_CKPT", help=text)
    path = parser.parse_args(argv).checkpoint
    try:
        checkpoint = find_checkpoint(path) if path.is_dir() else path
        found = read_checkpoint(checkpoint)
        if _loads(checkpoint):
            return print(f"{checkpoint}: loads as it is, nothing needs to be converted")
        file = write_weights(checkpoint, found.tensors)
    except (ValueError, OSError) as error:
        sys.exit(_fail(str(error)))
    print(f"{checkpoint}: holds more than weights; nothing of it was run")
    size = sum(tensor.nbytes for tensor in found.tensors.values())
    print(f"kept {len(found.tensors)} tensors, {size / 1e6:.1f} MB")
    print(f"left out {', '.join(map(_shown, found.left_out[:20])) or 'nothing else'}")
    for name, count in found.names.most_common(20):
        print(f"refers to {_shown(name)} ({count}x): left out, not run")
    if len(found.names) > 20:
        print(f"and to {len(found.names) - 20} more names")
    print(f"wrote {file}")


def _loads(checkpoint: Path) -> bool:
    try:
        load_weights_only(checkpoint)
    except Exception:  # whatever torch raises at a file that holds more than tensors, it does not load
        return False
    return True


def _shown(name: str) -> str:
    """A name of a foreign file, fit for a terminal."""
    return name[:120].encode("unicode_escape").decode()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (--help lists the flags)"))


def _fail(message: str) -> int:
    """One line on stderr; returns the exit code of a user's mistake."""
    print(f"{NAME}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
