"""Checkpoints that hold more than weights: their weights come out, what else they are is said, nothing of it runs."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.pipelines.conftest import ROOT
from tokenizer import convert, load_tokenizer
from tokenizer.taming import TamingTokenizer

DDCONFIG = {
    **{"double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32},
    **{"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0},
}
PARAMS = {"ddconfig": DDCONFIG, "embed_dim": 8, "n_embed": 32, "lossconfig": {"target": "torch.nn.Identity"}}


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles name as one of Lightning's; it is not there when they are read."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    parent = ModuleType("pytorch_lightning")
    cls = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = cls  # type: ignore[attr-defined]
    for name, item in (
        (module.__name__, module),
        ("pytorch_lightning", parent),
        ("pytorch_lightning.callbacks", parent),
    ):
        monkeypatch.setitem(sys.modules, name, item)
    return cls


@pytest.fixture
def network() -> TamingTokenizer:
    torch.manual_seed(0)
    return TamingTokenizer(quantizer="VectorQuantizer2", n_embed=32, embed_dim=8, ddconfig=DDCONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A taming folder without a checkpoint."""
    settings = {"model": {"target": "taming.models.vqgan.VQModel", "params": PARAMS}}
    (tmp_path / "vqgan" / "checkpoints").mkdir(parents=True)
    (tmp_path / "vqgan" / "model.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "vqgan"


def old_checkpoint(network: TamingTokenizer, callback: type, **more: Any) -> dict[str, Any]:
    """As Lightning 1.0 wrote it: callbacks by their classes."""
    loss = {"loss.discriminator.main.0.weight": torch.randn(3, 3), "loss.logvar": torch.zeros(())}
    return {
        "epoch": 3,
        "global_step": 1000,
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "monitor": callback()}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 4.5e-6}]}],
        "state_dict": OrderedDict({**network.state_dict(), **loss}),
        **more,
    }


def converted(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints."""
    convert.main([str(path)])
    written = capsys.readouterr()
    assert written.err == ""
    return written.out


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that it is refused with, exit code 2."""
    with pytest.raises(SystemExit) as end:
        convert.main([str(path)])
    written = capsys.readouterr()
    assert end.value.code == 2 and written.out == ""
    assert re.fullmatch(r"python -m tokenizer.convert: error: [^\n]{10,600}\n", written.err)
    return written.err


def test_the_loader_says_what_to_do_and_then_it_loads(folder: Path, network: TamingTokenizer, lightning: type) -> None:
    file = folder / "checkpoints" / "last.ckpt"
    torch.save(old_checkpoint(network, lightning, hyper_parameters=Payload(folder / "canary")), file)
    with pytest.raises(ValueError) as error:
        load_tokenizer(f"taming:{folder}")
    assert str(error.value) == (
        f"{file} holds more than weights (pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint): "
        f"convert it once with python -m tokenizer.convert {folder}"
    )
    command = [sys.executable, "-m", "tokenizer.convert", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    size = sum(tensor.nbytes for tensor in network.state_dict().values()) + 40
    assert result.stdout.splitlines() == [
        f"{file}: holds more than weights; nothing of it was run",
        f"kept {len(network.state_dict()) + 2} tensors, {size / 1e6:.1f} MB",
        "left out epoch, global_step, callbacks, optimizer_states, hyper_parameters",
        "refers to pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint (1x): left out, not run",
        "refers to posix.system (1x): left out, not run",
        f"wrote {folder / 'checkpoints' / 'weights.safetensors'}",
    ]
    assert load_tokenizer(f"taming:{folder}").fingerprint() == network.fingerprint()
    assert not (folder / "canary").exists()
    assert sorted(path.name for path in file.parent.iterdir()) == ["last.ckpt", "weights.safetensors"]


def test_every_type_and_layout_of_tensor_comes_out_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = torch.randn(6, 5)
    state = {
        **{str(t): torch.arange(5).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64)},
        **{str(t): torch.arange(5).to(t) for t in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)},
        "transposed": shared.T,
        "rows": shared[2:4],
        "columns": shared[:, 1:3],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 7),
        "number": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "Schlüssel\n": torch.randn(2),
    }
    torch.save({"state_dict": state, "payload": Payload(tmp_path / "canary")}, tmp_path / "x.ckpt")
    converted(tmp_path / "x.ckpt", capsys)
    found = load_file(tmp_path / "weights.safetensors")
    assert set(found) == set(state)
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_followed(tmp_path: Path, protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        1,
        -5,
        2**70,
        1.5,
        "a",
        b"b",
        bytearray(b"c"),
        None,
        True,
        (),
        (1,),
        (1, 2, 3, 4),
        {1, 2},
        frozenset("d"),
        {},
    ]
    checkpoint = {"more": [*more, Payload(tmp_path / "canary"), OrderedDict(a=1)], "state_dict": {"x": torch.ones(3)}}
    torch.save(checkpoint, tmp_path / "x.ckpt", pickle_protocol=protocol)
    assert "posix.system (1x)" in converted(tmp_path / "x.ckpt", capsys)
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["x"], torch.ones(3))


def test_a_checkpoint_that_loads_is_left_alone(
    folder: Path, network: TamingTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": network.state_dict(), "epoch": 1}, file)
    for path in (folder, file):
        assert converted(path, capsys) == f"{file}: loads as it is, nothing needs to be converted\n"
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_what_is_no_tensor_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"x": torch.ones(3), "y": Payload(tmp_path / "canary"), "z": 5}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert "left out state_dict.y, state_dict.z" in converted(tmp_path / "x.ckpt", capsys)
    assert list(load_file(tmp_path / "weights.safetensors")) == ["x"]


def test_help_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        convert.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "FOLDER_OR_CKPT" in said
    assert "The weights of a Lightning checkpoint that holds more than weights" in said
    with pytest.raises(SystemExit) as end:
        convert.main(["a", "b"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "--help lists the flags" in said
    assert "no .ckpt in it" in refused(tmp_path, capsys)
    refused(tmp_path / "none.ckpt", capsys)
    os.mkfifo(tmp_path / "pipe.ckpt")
    refused(tmp_path / "pipe.ckpt", capsys)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"x": torch.ones(3)}, "payload": Payload(tmp_path / "canary")}, tmp_path / "x.ckpt")
    (tmp_path / "weights.safetensors").mkdir()
    refused(tmp_path / "x.ckpt", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors", "x.ckpt"]


# --- hostile files


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


def whole(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    size: tuple[int, ...] = (3,), stride: tuple[int, ...] = (1,), offset: int = 0, numbers: int = 3, key: str = "0"
) -> bytes:
    """Instructions of a float32 tensor."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + whole(numbers) + b"tQ"
    shape = b"".join(b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(offset) + shape + b"\x89Nt" + b"R"


def with_foreign(instructions: bytes) -> bytes:
    """A checkpoint whose state_dict the instructions make, and a name besides."""
    return b"\x80\x02}(" + text("state_dict") + instructions + text("more") + b"cposix\nsystem\nu."


def dictionary(value: bytes) -> bytes:
    return b"}" + text("a") + value + b"s"


ZEROS = {"data/0": bytes(12)}
TUPLES = b")p0\n0" + b"".join(b"(g%d\ng%d\ntp%d\n0" % (n, n, n + 1) for n in range(60)) + b"g60\n"
HOSTILE: dict[str, tuple[bytes, dict[str, bytes], str]] = {
    "size beyond the storage": (with_foreign(dictionary(tensor((4,)))), ZEROS, "reaches beyond its storage"),
    "offset beyond the storage": (with_foreign(dictionary(tensor(offset=1))), ZEROS, "reaches beyond its storage"),
    "stride beyond the storage": (with_foreign(dictionary(tensor(stride=(2,)))), ZEROS, "reaches beyond its storage"),
    "negative offset": (with_foreign(dictionary(tensor(offset=-1))), ZEROS, "the shape of a is no shape"),
    "negative size": (with_foreign(dictionary(tensor((-3,)))), ZEROS, "the shape of a is no shape"),
    "negative stride": (with_foreign(dictionary(tensor(stride=(-1,)))), ZEROS, "the shape of a is no shape"),
    "unequal lengths": (with_foreign(dictionary(tensor((3, 1)))), ZEROS, "the shape of a is no shape"),
    "declared huge": (with_foreign(dictionary(tensor((2**62,), numbers=2**62))), ZEROS, "the shape of a is no shape"),
    "huge of one number": (
        with_foreign(dictionary(tensor((100, 100), (0, 0)))),
        ZEROS,
        "declared larger than the file",
    ),
    "many large ones": (
        with_foreign(b"}(" + b"".join(text(f"k{n}") + tensor((150,), (0,)) for n in range(9)) + b"u"),
        ZEROS,
        "is declared larger than the file",
    ),
    "storage that is not there": (with_foreign(dictionary(tensor(key="7"))), ZEROS, "data/7 is not in its archive"),
    "storage outside": (with_foreign(dictionary(tensor(key="../../x"))), ZEROS, "is not in its archive"),
    "half a number": (with_foreign(dictionary(tensor((2,)))), {"data/0": bytes(11)}, "element size"),
    "no state_dict": (b"\x80\x02}" + text("model") + b"}s.", {}, "there is no state_dict in it"),
    "a state_dict that would be made": (
        b"\x80\x02}" + text("state_dict") + b"cposix\nsystem\n" + text("touch canary") + b"\x85Rs.",
        {},
        "there is no state_dict in it",
    ),
    "no tensors": (with_foreign(b"}"), {}, "its state_dict has no tensors"),
    "a tuple instead": (b"\x80\x02).", {}, "there is no state_dict in it"),
    "nothing": (b"", {}, "its pickle is damaged"),
    "no end": (with_foreign(dictionary(tensor()))[:-1], ZEROS, "its pickle is damaged"),
    "an empty stack": (b"\x80\x02s.", {}, "its pickle is damaged"),
    "a mark that is missing": (b"\x80\x02t.", {}, "its pickle is damaged"),
    "a memo that is missing": (b"\x80\x02h\x05.", {}, "its pickle is damaged"),
    "two values": (b"\x80\x02}}.", {}, "its pickle is damaged"),
    "an unknown instruction": (b"\x80\x02\xff.", {}, "its pickle is damaged"),
    "half a dictionary": (b"\x80\x02}(" + text("state_dict") + b"u.", {}, "there is no state_dict in it"),
    "instructions without end": (b"\x80\x02" + b"N0" * convert.INSTRUCTIONS, {}, "instructions"),
    "marks without end": (b"\x80\x02" + b"(" * convert.INSTRUCTIONS, {}, "its pickle is damaged"),
    "deep tuples": (with_foreign(b")" + b"\x85" * 500_000), {}, "there is no state_dict in it"),
    "deep lists": (with_foreign(b"]" * 400_000 + b"a" * 399_999), {}, "there is no state_dict in it"),
    "deep dictionaries": (with_foreign((b"}" + b"K\x01") * 300_000 + b"}" + b"s" * 300_000), {}, "no tensors"),
    "a key that is endless to hash": (
        with_foreign(b"}" + TUPLES + b"Ns"),
        {},
        "a key of a dictionary is made of tuples",
    ),
    "a value that is endless to print": (with_foreign(dictionary(TUPLES)), {}, "its state_dict has no tensors"),
    "its own part": (b"\x80\x02}q\x00(" + text("state_dict") + b"h\x00" + text("b") + b"h\x00u.", {}, "no tensors"),
    "another byte order": (with_foreign(dictionary(tensor())), {**ZEROS, "byteorder": b"big"}, "another byte order"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, records, said = HOSTILE[case]
    file = archive(tmp_path / "x.ckpt", data, records)
    began = time.monotonic()
    assert said in refused(file, capsys)
    assert time.monotonic() - began < 20
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_the_forgeries_above_are_near_to_what_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"data/0": torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes(), "byteorder": sys.byteorder.encode()}
    file = archive(tmp_path / "x.ckpt", with_foreign(dictionary(tensor())), numbers)
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
def test_every_way_to_name_something_is_noted(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    instructions, name = CALLS[case]
    data = b"\x80\x02}(" + text("state_dict") + dictionary(tensor()) + text("more") + instructions + b"u."
    assert f"refers to {name} (1x): left out, not run" in converted(archive(tmp_path / "x.ckpt", data, ZEROS), capsys)


def test_twenty_names_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    with zipfile.ZipFile(archive(file, with_foreign(dictionary(tensor())), ZEROS), "a") as opened:
        opened.writestr("y/data.pkl", b"N.")


def _lying_lengths(file: Path) -> None:
    """The archive's directory declares 2 GB of pickle."""
    data = bytearray(archive(file, with_foreign(dictionary(tensor())), ZEROS).read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    file.write_bytes(data)


def _overlapping(file: Path) -> None:
    """One storage of the archive lies in another, as all of a thousand could."""
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
    "compressed": lambda file: archive(file, with_foreign(dictionary(tensor())), ZEROS, zipfile.ZIP_DEFLATED),
    "two pickles": _two_pickles,
    "no pickle": lambda file: zipfile.ZipFile(file, "w").close(),
    "lying lengths": _lying_lengths,
    "overlapping": _overlapping,
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("a program was loaded"))
    FILES[case](tmp_path / "x.ckpt")
    assert f"{tmp_path / 'x.ckpt'}: is no checkpoint that can be converted: " in refused(tmp_path / "x.ckpt", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_every_cut_and_flip_of_a_checkpoint_is_refused_or_harmless(tmp_path: Path) -> None:
    """Only errors that are foreseen, and never another tensor than there was."""
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
            found = convert.read_checkpoint(tmp_path / "x.ckpt")
        except (ValueError, OSError):
            continue
        kept += 1
        assert all(torch.equal(tensor, torch.arange(3.0)) for tensor in found.tensors.values())
    assert 0 < kept < len(files)
    assert not (tmp_path / "canary").exists()
