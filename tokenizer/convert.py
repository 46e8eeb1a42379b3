"""Extract the weights of a Lightning checkpoint that holds more than weights: `python -m tokenizer.convert`.

The pickle in a checkpoint is a program that may call any function. This module interprets its instructions symbolically:
it records names and the location of each tensor's bytes, and it imports, calls and builds nothing.

`torch.load(weights_only=True)` of torch 2.13 cannot do this, even with stub classes in `add_safe_globals`: it refuses pickle
protocols 4 and 5, and every checkpoint that refers to `posix` or `sys`. `torch.load` with a custom `pickle_module` is not
safe: it executes a TorchScript file that is named like a checkpoint.
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

from tokenizer.messages import printable, show_name
from tokenizer.taming import WEIGHTS, find_checkpoint, load_weights_only

INSTRUCTIONS = 2_000_000
"""Largest number of instructions in a pickle, against damaged or hostile files; a tensor takes about 30."""

_LISTED = 20
_DTYPES = {
    f"torch.{name}Storage": getattr(torch, name.lower())
    for name in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
} | {"torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8}
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_DICTIONARY = "collections.OrderedDict"


# --- symbolic interpretation of a pickle


class _Name(str):
    """Full name of an object that unpickling would import."""


class _Pairs(list):
    """Dictionary as a list of alternating keys and values, so that keys are never hashed."""


@dataclass(frozen=True)
class _Storage:
    """Reference to a file of the archive that holds numbers of one dtype."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class _View:
    """Arguments from which torch would build a tensor, not validated yet."""

    storage: _Storage
    offset: Any
    size: Any
    stride: Any


_OPAQUE = object()
"""Placeholder for all values that are not needed: results of calls, lists and sets."""


class _PickleInterpreter:
    """Interpreter of a pickle that keeps only numbers, strings, tuples, dictionaries and references to tensors.

    `names` counts the names that the pickle refers to, except those of dictionaries and tensors.
    """

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self._stack: list[Any] = []
        self._stacks_below: list[list[Any]] = []
        self._memo: dict[Any, Any] = {}

    def run(self, pickle: bytes) -> Any:
        """Return the value of a pickle.

        Raises:
            ValueError: if the pickle is damaged, or has more than `INSTRUCTIONS` instructions.
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
                self._stacks_below.append(self._stack)
                self._stack = []
            case "POP" if not self._stack:
                self._pop_to_mark()
            case "POP" | "APPEND" | "BUILD":
                self._pop(1)
            case "POP_MARK" | "APPENDS" | "ADDITEMS":
                self._pop_to_mark()
            case "DUP":
                self._stack.append(self._stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case _:
                # Two statements, because `_value` may replace `self._stack`.
                value = self._value(instruction, argument)
                self._stack.append(value)

    def _value(self, instruction: str, argument: Any) -> Any:
        """Return the value that an instruction pushes on the stack."""
        match instruction:
            case "NEWTRUE" | "NEWFALSE":
                return instruction == "NEWTRUE"
            case "EMPTY_DICT":
                return _Pairs()
            case "DICT":
                return _pairs(self._pop_to_mark())
            case "EMPTY_TUPLE":
                return ()
            case "TUPLE":
                return tuple(self._pop_to_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self._pop(int(instruction[-1])))
            case "GLOBAL":
                return self._record(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                module, name = (part if isinstance(part, str) else "?" for part in self._pop(2))
                return self._record(f"{module}.{name}")
            case "REDUCE":
                return _call_result(*self._pop(2))
            case "BINPERSID":
                match self._pop(1):
                    # The id that torch.save writes for a storage.
                    case [("storage", _Name() as kind, str(key), _, _)] if kind in _DTYPES:
                        return _Storage(_DTYPES[kind], key)
            case "EXT1" | "EXT2" | "EXT4":
                self._record(f"extension {argument}")
            case "INST":
                self._record(argument.replace(" ", ".", 1))
                self._pop_to_mark()
            case "LIST" | "FROZENSET" | "OBJ":
                self._pop_to_mark()
            case "NEWOBJ" | "NEWOBJ_EX":
                self._pop(2 if instruction == "NEWOBJ" else 3)
            case "EMPTY_LIST" | "EMPTY_SET" | "NEXT_BUFFER" | "PERSID":
                pass
            case _:
                # All other instructions push their argument: a number, a string, bytes or None.
                return argument
        return _OPAQUE

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("its stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._stacks_below.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], _Pairs):
            self._stack[-1].extend(_pairs(items))

    def _record(self, name: str) -> _Name:
        if name not in (*_DTYPES, _TENSOR, _PARAMETER, _DICTIONARY):
            self.names[name] += 1
        return _Name(name)


def _pairs(items: list[Any]) -> _Pairs:
    for key in items[::2]:
        # torch.load would hash nested tuples with shared parts for ever, even if they are small in the file.
        if isinstance(key, tuple) and any(isinstance(item, tuple) for item in key):
            raise ValueError("a key of a dictionary is made of tuples of tuples")
    return _Pairs(items)


def _call_result(function: Any, arguments: Any) -> Any:
    """Return the dictionary or the view of a tensor that a call would build; the placeholder for any other call."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        return _OPAQUE
    if function == _DICTIONARY and not arguments:
        return _Pairs()
    if function == _TENSOR and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
        return _View(*arguments[:4])
    if function == _PARAMETER and arguments and isinstance(arguments[0], _View):
        return arguments[0]
    return _OPAQUE


# --- the checkpoint


@dataclass(frozen=True)
class Contents:
    """Contents of a checkpoint."""

    tensors: dict[str, Tensor]
    """Tensors of its `state_dict`."""
    left_out: list[str]
    """Keys of all other parts of the checkpoint, and keys of the `state_dict` whose values are not tensors."""
    names: Counter[str]
    """Names of the classes and functions that the checkpoint refers to, with counts."""


def read_checkpoint(file: Path) -> Contents:
    """Read the weights of a checkpoint without executing anything in it.

    Raises:
        ValueError: if the file is not a checkpoint, is damaged, or declares more data than it holds.
        OSError: if the file cannot be read.
    """
    try:
        if not file.is_file() or not zipfile.is_zipfile(file):
            raise ValueError("not a zip archive, the format of torch.save since torch 1.6")
        with zipfile.ZipFile(file) as archive:
            return _Archive(archive, file.stat().st_size).read()
    except (ValueError, RuntimeError, OverflowError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: cannot be converted: {error}") from None


class _Archive:
    """Zip archive as written by torch.save: `<name>/data.pkl`, and `<name>/data/<key>` for each storage."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._size = archive, size
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        self._storages: dict[str, bytearray] = {}
        pickles = [name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl in its archive, found {len(pickles)}")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in self._entries and self._bytes("byteorder") != sys.byteorder.encode():
            raise ValueError("it was written on a machine with another byte order")

    def read(self) -> Contents:
        interpreter = _PickleInterpreter()
        parts = _dictionary(interpreter.run(self._bytes("data.pkl")))
        state = parts.pop("state_dict", None)
        if not isinstance(state, _Pairs):
            raise ValueError("it has no state_dict")
        contents = Contents({}, list(parts), interpreter.names)
        bytes_left = self._size
        for key, value in _dictionary(state).items():
            if isinstance(value, _View):
                contents.tensors[key] = tensor = self._tensor(key, value, bytes_left)
                bytes_left -= tensor.nbytes
            else:
                contents.left_out.append(f"state_dict.{key}")
        if not contents.tensors:
            raise ValueError("its state_dict has no tensors")
        return contents

    def _tensor(self, key: str, view: _View, bytes_left: int) -> Tensor:
        """Return a validated copy of a tensor of at most `bytes_left` bytes."""
        tuples = isinstance(view.size, tuple) and isinstance(view.stride, tuple) and len(view.size) == len(view.stride)
        numbers = (*view.size, *view.stride, view.offset) if tuples else ()
        if not numbers or not all(type(number) is int and 0 <= number <= self._size for number in numbers):
            raise ValueError(f"{key} has an invalid shape")
        if prod(view.size) * view.storage.dtype.itemsize > bytes_left:
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
        flat = torch.frombuffer(storage, dtype=view.storage.dtype)
        return flat.as_strided(view.size, view.stride, view.offset).clone(memory_format=torch.contiguous_format)

    def _bytes(self, name: str) -> bytes:
        entry = self._entries.get(self._folder + name)
        if entry is None:
            raise ValueError(f"{name} is not in its archive")
        if entry.compress_type != zipfile.ZIP_STORED or max(entry.file_size, entry.compress_size) > self._size:
            raise ValueError(f"{name} in its archive is compressed, or larger than the file")
        return self._archive.read(entry)


def _dictionary(value: Any) -> dict[str, Any]:
    """Return pairs as a dictionary, without the pairs whose key is not a string."""
    if not isinstance(value, _Pairs) or len(value) % 2:
        raise ValueError("it has no state_dict")
    return {key: item for key, item in zip(value[::2], value[1::2], strict=True) if isinstance(key, str)}


# --- the command


def write_weights(checkpoint: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors atomically to a file next to the checkpoint, and return its path.

    Raises:
        ValueError: if safetensors cannot write the tensors.
        OSError: if the file cannot be written or renamed.
    """
    file = checkpoint.parent / WEIGHTS
    temporary = file.with_name(f".{WEIGHTS}.{os.getpid()}")
    try:
        save_file(tensors, temporary)
        with temporary.open("rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a checkpoint and print its contents; on an error, print one line to stderr and exit with code 2."""
    description = (
        "Convert the weights of a Lightning checkpoint to safetensors, without the other objects in the checkpoint."
    )
    parser = _Parser(prog="python -m tokenizer.convert", description=description, allow_abbrev=False)
    help_text = f"checkpoint, or folder of a taming tokenizer; {WEIGHTS} is written next to the checkpoint"
    parser.add_argument("checkpoint", type=Path, metavar="FOLDER_OR_CKPT", help=help_text)
    path = parser.parse_args(argv).checkpoint
    try:
        checkpoint = find_checkpoint(path) if path.is_dir() else path
        contents = read_checkpoint(checkpoint)
        try:
            load_weights_only(checkpoint)
        # torch raises exceptions of many types for files that hold more than tensors.
        except Exception:
            file = write_weights(checkpoint, contents.tensors)
        else:
            print(printable(f"{checkpoint}: loads as it is, nothing needs to be converted"))
            return
    except (ValueError, OSError) as error:
        parser.fail(str(error))
    size = sum(tensor.nbytes for tensor in contents.tensors.values())
    left_out = [show_name(name) for name in contents.left_out[:_LISTED]]
    print(printable(f"{checkpoint}: holds more than weights; nothing in it was executed"))
    print(f"kept {len(contents.tensors)} tensors, {size / 1e6:.1f} MB")
    print(f"left out {', '.join(left_out) or 'no entries'}")
    for name, count in contents.names.most_common(_LISTED):
        print(f"refers to {show_name(name)} ({count}x): left out, not run")
    if len(contents.names) > _LISTED:
        print(f"and to {len(contents.names) - _LISTED} more names")
    print(printable(f"wrote {file}"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.fail(f"{message} (--help lists the flags)")

    def fail(self, message: str) -> NoReturn:
        """Print the message in one line to stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {printable(' '.join(message.split()))}\n")


if __name__ == "__main__":
    main()
