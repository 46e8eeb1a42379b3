"""Forged checkpoints: each is refused with a one-line error, and nothing in them is executed."""

import io
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.vqgan_folders import Payload
from tests.tokenizer.test_convert import converted, refused
from tokenizer import convert


def archive(
    file: Path, data: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(file, "w", compression) as opened:
        opened.writestr("x/data.pkl", data)
        for name, record in (records or {}).items():
            opened.writestr(f"x/{name}", record)
    return file


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    size: tuple[int, ...] = (3,), stride: tuple[int, ...] = (1,), offset: int = 0, numbers: int = 3, key: str = "0"
) -> bytes:
    """Return pickle instructions that make a float32 tensor."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + integer(numbers) + b"tQ"
    shape = b"".join(b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(offset) + shape + b"\x89Nt" + b"R"


def with_foreign(instructions: bytes) -> bytes:
    """Return a pickled checkpoint with a foreign name, whose state_dict is made by the given instructions."""
    return b"\x80\x02}(" + text("state_dict") + instructions + text("more") + b"cposix\nsystem\nu."


def dictionary(value: bytes) -> bytes:
    return b"}" + text("a") + value + b"s"


def state(value: bytes) -> bytes:
    """Return a pickled checkpoint with a foreign name, whose state_dict has one value."""
    return with_foreign(dictionary(value))


ZEROS = {"data/0": bytes(12)}
TUPLES = b")p0\n0" + b"".join(b"(g%d\ng%d\ntp%d\n0" % (n, n, n + 1) for n in range(60)) + b"g60\n"
HOSTILE: dict[str, tuple[bytes, dict[str, bytes], str]] = {
    "size beyond the storage": (state(tensor((4,))), ZEROS, "reaches beyond its storage"),
    "offset beyond the storage": (state(tensor(offset=1)), ZEROS, "reaches beyond its storage"),
    "stride beyond the storage": (state(tensor(stride=(2,))), ZEROS, "reaches beyond its storage"),
    "negative offset": (state(tensor(offset=-1)), ZEROS, "a has an invalid shape"),
    "negative size": (state(tensor((-3,))), ZEROS, "a has an invalid shape"),
    "negative stride": (state(tensor(stride=(-1,))), ZEROS, "a has an invalid shape"),
    "unequal lengths": (state(tensor((3, 1))), ZEROS, "a has an invalid shape"),
    "declared huge": (state(tensor((2**62,), numbers=2**62)), ZEROS, "a has an invalid shape"),
    "huge of one number": (state(tensor((100, 100), (0, 0))), ZEROS, "declared larger than the file"),
    "many large ones": (
        with_foreign(b"}(" + b"".join(text(f"k{n}") + tensor((150,), (0,)) for n in range(9)) + b"u"),
        ZEROS,
        "is declared larger than the file",
    ),
    "storage that is not there": (state(tensor(key="7")), ZEROS, "data/7 is not in its archive"),
    "storage outside": (state(tensor(key="../../x")), ZEROS, "is not in its archive"),
    "half a number": (state(tensor((2,))), {"data/0": bytes(11)}, "element size"),
    "no state_dict": (b"\x80\x02}" + text("model") + b"}s.", {}, "it has no state_dict"),
    "a state_dict that would be made": (
        b"\x80\x02}" + text("state_dict") + b"cposix\nsystem\n" + text("touch canary") + b"\x85Rs.",
        {},
        "it has no state_dict",
    ),
    "no tensors": (with_foreign(b"}"), {}, "its state_dict has no tensors"),
    "a tuple instead": (b"\x80\x02).", {}, "it has no state_dict"),
    "nothing": (b"", {}, "its pickle is damaged"),
    "no end": (state(tensor())[:-1], ZEROS, "its pickle is damaged"),
    "an empty stack": (b"\x80\x02s.", {}, "its pickle is damaged"),
    "a mark that is missing": (b"\x80\x02t.", {}, "its pickle is damaged"),
    "a memo that is missing": (b"\x80\x02h\x05.", {}, "its pickle is damaged"),
    "two values": (b"\x80\x02}}.", {}, "its pickle is damaged"),
    "an unknown instruction": (b"\x80\x02\xff.", {}, "its pickle is damaged"),
    "half a dictionary": (b"\x80\x02}(" + text("state_dict") + b"u.", {}, "it has no state_dict"),
    "instructions without end": (b"\x80\x02" + b"N0" * convert.INSTRUCTIONS, {}, "instructions"),
    "marks without end": (b"\x80\x02" + b"(" * convert.INSTRUCTIONS, {}, "its pickle is damaged"),
    "deep tuples": (with_foreign(b")" + b"\x85" * 500_000), {}, "it has no state_dict"),
    "deep lists": (with_foreign(b"]" * 400_000 + b"a" * 399_999), {}, "it has no state_dict"),
    "deep dictionaries": (with_foreign((b"}" + b"K\x01") * 300_000 + b"}" + b"s" * 300_000), {}, "no tensors"),
    "a key that is endless to hash": (
        with_foreign(b"}" + TUPLES + b"Ns"),
        {},
        "a key of a dictionary is made of tuples",
    ),
    "a value that is endless to print": (state(TUPLES), {}, "its state_dict has no tensors"),
    "its own part": (b"\x80\x02}q\x00(" + text("state_dict") + b"h\x00" + text("b") + b"h\x00u.", {}, "no tensors"),
    "another byte order": (state(tensor()), {**ZEROS, "byteorder": b"big"}, "another byte order"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, records, reason = HOSTILE[case]
    file = archive(tmp_path / "x.ckpt", data, records)
    start = time.monotonic()
    assert reason in refused(file, capsys)
    assert time.monotonic() - start < 20
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_pickle_like_the_hostile_ones_but_valid_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control of the test above."""
    numbers = {"data/0": torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes(), "byteorder": sys.byteorder.encode()}
    file = archive(tmp_path / "x.ckpt", state(tensor()), numbers)
    assert "refers to posix.system (1x)" in converted(file, capsys)
    assert load_file(tmp_path / "weights.safetensors")["a"].tolist() == [1, 2, 3]


CALLS = {
    "a global": (b"cposix\nsystem\n", "posix.system"),
    "a global of protocol 4": (text("posix") + text("system") + b"\x93", "posix.system"),
    "a global of no texts": (b"K\x05K\x06\x93", "?.?"),
    "a call": (b"cposix\nsystem\n" + text("x") + b"\x85R", "posix.system"),
    "an object": (b"cbuiltins\neval\n)\x81", "builtins.eval"),
    "an object of keywords": (b"cbuiltins\neval\n)}\x92", "builtins.eval"),
    "an object of protocol 0": (b"(" + text("x") + b"iposix\nsystem\n", "posix.system"),
    "an object of protocol 1": (b"(cposix\nsystem\n" + text("x") + b"o", "posix.system"),
    "state": (b"cbuiltins\neval\n)\x81}b", "builtins.eval"),
    "an extension": (b"\x82\x05", "extension 5"),
    "a name for the terminal": (b"c\x1b[2Jposix\nsystem\n", "\\x1b[2Jposix.system"),
    "a mark that is taken away": (b"(0cposix\nsystem\n", "posix.system"),
    "a reference by text": (b"cposix\nsystem\n0Psomething\n", "posix.system"),
}


@pytest.mark.parametrize("case", CALLS)
def test_every_instruction_that_names_something_is_listed(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    instructions, name = CALLS[case]
    data = b"\x80\x02}(" + text("state_dict") + dictionary(tensor()) + text("more") + instructions + b"u."
    assert f"refers to {name} (1x): left out, not run" in converted(archive(tmp_path / "x.ckpt", data, ZEROS), capsys)


def test_at_most_twenty_names_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = b"".join(text(f"k{n}") + b"cmodule\nname%d\n" % n for n in range(50))
    data = b"\x80\x02}(" + text("state_dict") + dictionary(tensor()) + names + b"u."
    lines = converted(archive(tmp_path / "x.ckpt", data, ZEROS), capsys).splitlines()
    assert len(lines) == 25 and "and to 30 more names" in lines


def _program(file: Path) -> None:
    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Program()), file)


def _two_pickles(file: Path) -> None:
    with zipfile.ZipFile(archive(file, state(tensor()), ZEROS), "a") as opened:
        opened.writestr("y/data.pkl", b"N.")


def _lying_lengths(file: Path) -> None:
    """Write an archive whose directory declares 2 GB of pickle."""
    data = bytearray(archive(file, state(tensor()), ZEROS).read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    file.write_bytes(data)


def _overlapping(file: Path) -> None:
    """Write an archive with one storage inside another. A thousand storages could overlap in this way."""
    data = with_foreign(
        b"}(" + text("a") + tensor(key="0", numbers=600) + text("b") + tensor(key="1", numbers=600) + b"u"
    )
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as opened:
        opened.writestr("x/data/1", bytes(2400))
        (entry,) = opened.infolist()
        local = inner.getvalue()[: 30 + len("x/data/1") + 2400]
    archive(file, data, {"data/0": local + bytes(-len(local) % 4)})
    with zipfile.ZipFile(file, "a") as opened:
        entry.header_offset = opened.getinfo("x/data/0").header_offset + 30 + len("x/data/0")
        opened.filelist.append(entry)
        opened.NameToInfo[entry.filename] = entry
        opened.writestr("x/end", b"")


FILES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda file: file.write_bytes(b""),
    "no archive": lambda file: file.write_bytes(pickle.dumps({"state_dict": {}})),
    "legacy": lambda file: torch.save({"x": Payload(file)}, file, _use_new_zipfile_serialization=False),
    "a program": _program,
    "compressed": lambda file: archive(file, state(tensor()), ZEROS, zipfile.ZIP_DEFLATED),
    "two pickles": _two_pickles,
    "no pickle": lambda file: zipfile.ZipFile(file, "w").close(),
    "lying lengths": _lying_lengths,
    "overlapping": _overlapping,
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_a_checkpoint_is_refused_in_one_line(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("a program was loaded"))
    FILES[case](tmp_path / "x.ckpt")
    assert f"{tmp_path / 'x.ckpt'}: cannot be converted: " in refused(tmp_path / "x.ckpt", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_every_cut_and_flip_of_a_checkpoint_is_refused_or_harmless(tmp_path: Path) -> None:
    """A damaged checkpoint raises ValueError or OSError, or yields the original tensor."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.arange(3.0)}, "payload": Payload(tmp_path / "canary")}, buffer)
    good = buffer.getvalue()
    files = [good[:length] for length in range(0, len(good), 16)]
    for position in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        files.append(bytes(flipped))
    kept = 0
    for data in files:
        (tmp_path / "x.ckpt").write_bytes(data)
        try:
            contents = convert.read_checkpoint(tmp_path / "x.ckpt")
        except (ValueError, OSError):
            continue
        kept += 1
        assert all(torch.equal(tensor, torch.arange(3.0)) for tensor in contents.tensors.values())
    assert 0 < kept < len(files)
    assert not (tmp_path / "canary").exists()
