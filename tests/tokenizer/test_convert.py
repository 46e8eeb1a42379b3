"""Checkpoints that hold more than weights: their weights come out, what else they are is said, nothing of it runs."""

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
