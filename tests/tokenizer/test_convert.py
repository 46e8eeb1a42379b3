"""Conversion of checkpoints that hold more than weights keeps the weights, lists the rest, and executes nothing."""

import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.commands import ROOT
from tests.helpers.vqgan_folders import SMALL, TINY, Payload
from tokenizer import convert, load_tokenizer
from tokenizer.taming import TamingTokenizer


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that is pickled under a name of Lightning, which is not installed when the checkpoint is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    cls = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = cls  # type: ignore[attr-defined]
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return cls


@pytest.fixture
def network() -> TamingTokenizer:
    torch.manual_seed(0)
    return TamingTokenizer(quantizer="VectorQuantizer2", n_embed=32, embed_dim=8, ddconfig=TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A taming folder without a checkpoint."""
    (tmp_path / "vqgan" / "checkpoints").mkdir(parents=True)
    (tmp_path / "vqgan" / "model.yaml").write_text(yaml.safe_dump(SMALL["taming-f2-32"]))
    return tmp_path / "vqgan"


def old_checkpoint(network: TamingTokenizer, callback: type, **more: Any) -> dict[str, Any]:
    """Return a checkpoint in the format of Lightning 1.0, with classes of callbacks as keys."""
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
    """Convert a checkpoint and return the output."""
    convert.main([str(path)])
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one-line error of a conversion that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        convert.main([str(path)])
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert re.fullmatch(r"python -m tokenizer.convert: error: [^\n]{10,600}\n", output.err)
    return output.err


def test_the_error_of_the_loader_names_the_converter_and_converted_weights_load(
    folder: Path, network: TamingTokenizer, lightning: type
) -> None:
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
        f"{file}: holds more than weights; nothing in it was executed",
        f"kept {len(network.state_dict()) + 2} tensors, {size / 1e6:.1f} MB",
        "left out epoch, global_step, callbacks, optimizer_states, hyper_parameters",
        "refers to pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint (1x): left out, not run",
        "refers to posix.system (1x): left out, not run",
        f"wrote {folder / 'checkpoints' / 'weights.safetensors'}",
    ]
    assert load_tokenizer(f"taming:{folder}").fingerprint() == network.fingerprint()
    assert not (folder / "canary").exists()
    assert sorted(path.name for path in file.parent.iterdir()) == ["last.ckpt", "weights.safetensors"]


def test_every_dtype_and_layout_of_tensor_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    weights = load_file(tmp_path / "weights.safetensors")
    assert set(weights) == set(state)
    for key, tensor in state.items():
        assert weights[key].dtype == tensor.dtype and torch.equal(weights[key], tensor), key


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_supported(tmp_path: Path, protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    atoms = [1, -5, 2**70, 1.5, "a", b"b", bytearray(b"c"), None, True]
    containers = [(), (1,), (1, 2, 3, 4), {1, 2}, frozenset("d"), {}, OrderedDict(a=1)]
    more = [*atoms, *containers, Payload(tmp_path / "canary")]
    checkpoint = {"more": more, "state_dict": {"x": torch.ones(3)}}
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


def test_values_other_than_tensors_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"x": torch.ones(3), "y": Payload(tmp_path / "canary"), "z": 5}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert "left out state_dict.y, state_dict.z" in converted(tmp_path / "x.ckpt", capsys)
    assert list(load_file(tmp_path / "weights.safetensors")) == ["x"]


def test_help_and_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        convert.main(["--help"])
    output = capsys.readouterr().out
    assert end.value.code == 0 and "FOLDER_OR_CKPT" in output and "weights of a Lightning checkpoint" in output
    with pytest.raises(SystemExit) as end:
        convert.main(["a", "b"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "--help" in error
    assert "expected one .ckpt, found none" in refused(tmp_path, capsys)
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
