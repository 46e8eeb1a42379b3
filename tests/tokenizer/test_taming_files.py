"""Folders of VQGANs load in the accepted layouts. Each wrong, damaged or missing file gives a one-line error."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.commands import ROOT
from tests.helpers.vqgan_folders import lightning_checkpoint, refused, same_as_the_package
from tokenizer import VQ3D, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the folder


def test_a_flat_folder_of_a_training_run_loads(vqgan: tuple[Path, Any], details: Tensor, tmp_path: Path) -> None:
    folder, network = vqgan
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(folder / "configs" / "model.yaml", flat / "2020-11-09T13-31-51-project.yaml")
    (flat / "2020-11-09T13-31-51-lightning.yaml").write_text("lightning: {}")
    shutil.copy(folder / "checkpoints" / "last.ckpt", flat / "epoch=3.ckpt")
    tokenizer = load_tokenizer(f"taming:{flat}")
    assert tokenizer.fingerprint() == load_tokenizer(f"taming:{folder}").fingerprint()
    (flat / "epoch=2.ckpt").write_bytes(b"an older one")
    with pytest.raises(ValueError, match=r"one .ckpt, found epoch=2.ckpt, epoch=3.ckpt"):
        load_tokenizer(f"taming:{flat}")
    shutil.copy(flat / "epoch=3.ckpt", flat / "last.ckpt")
    assert load_tokenizer(f"taming:{flat}").fingerprint() == tokenizer.fingerprint()
    shutil.copy(folder / "configs" / "model.yaml", flat / "another-project.yaml")
    with pytest.raises(ValueError, match="one project .yaml, found .*another-project.yaml"):
        load_tokenizer(f"taming:{flat}")


def test_converted_weights_are_preferred_to_the_checkpoint(vqgan: tuple[Path, Any]) -> None:
    folder, network = vqgan
    before = load_tokenizer(f"taming:{folder}").fingerprint()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"not needed any more")
    state = {k: v.contiguous() for k, v in network.state_dict().items()}
    save_file(state, folder / "checkpoints" / "weights.safetensors")
    assert load_tokenizer(f"taming:{folder}").fingerprint() == before


def test_half_precision_weights_are_used_in_fp32(vqgan: tuple[Path, Any], details: Tensor) -> None:
    folder, network = vqgan
    torch.save(lightning_checkpoint(network.half()), folder / "checkpoints" / "last.ckpt")
    same_as_the_package(load_tokenizer(f"taming:{folder}"), network.float(), details)


def test_a_missing_file_of_the_folder_is_named(vqgan: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = vqgan
    assert "no such folder" in refused(f"taming:{tmp_path / 'none'}")
    assert "no such folder" in refused(f"taming:{folder / 'configs' / 'model.yaml'}")
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert refused(f"taming:{folder}") == f"{folder}: expected one .ckpt, found none"
    os.mkfifo(folder / "checkpoints" / "last.ckpt")
    assert refused(f"taming:{folder}") == f"{folder}: expected one .ckpt, found none"
    (folder / "configs" / "model.yaml").unlink()
    assert refused(f"taming:{folder}") == f"{folder}: expected one project .yaml, found none"


def test_a_missing_package_is_named_with_its_install_command(
    vqgan: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "taming.modules.vqvae.quantize", None)
    assert refused(f"taming:{vqgan[0]}").endswith("pip install --no-deps taming-transformers-rom1504")


def test_neither_lightning_nor_the_packages_models_are_imported(vqgan: tuple[Path, Any]) -> None:
    code = (
        "import sys; from tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])\n"
        "assert 'taming.modules.vqvae.quantize' in sys.modules\n"
        "assert not {'taming.models', 'taming.main', 'taming.modules.losses', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, f"taming:{vqgan[0]}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["taming", "torchscript", "vqvae:x"])
def test_a_folder_of_a_vq3d_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    own = VQ3D(width=8, depth=1)
    own.save_pretrained(name)
    assert load_tokenizer(name).fingerprint() == own.fingerprint()


@pytest.mark.parametrize("source", ["vqvae:folder", "hf:someone/tokenizer", "http://host/x", ":x"])
def test_the_error_for_an_unknown_kind_of_tokenizer_lists_the_known_kinds(source: str) -> None:
    message = refused(source)
    assert "taming:FOLDER" in message and "torchscript:FOLDER" in message


# --- the project file

Change = Callable[[dict[str, Any]], Any]
WRONG: dict[str, tuple[Change, str]] = {
    "another model": (
        lambda m: m.update(target="taming.models.cond_transformer.Net2NetTransformer"),
        "model.target is",
    ),
    "a program": (lambda m: m.update(target="os.system"), "model.target is 'os.system', expected one of"),
    "no target": (lambda m: m.pop("target"), "model.target is None"),
    "no parameters": (lambda m: m.update(params=None), "model.params is None, expected a mapping"),
    "an unknown parameter": (lambda m: m["params"].update(n_codes=3), "unknown field 'n_codes'"),
    "remap": (lambda m: m["params"].update(remap="used.npy"), "remap is 'used.npy', expected None: codes renumbered"),
    "no vocabulary": (lambda m: m["params"].pop("n_embed"), "model.params lacks n_embed, an integer"),
    "a text": (lambda m: m["params"].update(n_embed="32"), "n_embed is '32', expected an integer"),
    "true": (lambda m: m["params"].update(embed_dim=True), "embed_dim is True, expected an integer"),
    "a huge vocabulary": (lambda m: m["params"].update(n_embed=10**200), "n_embed is a int, expected an integer"),
    "an unknown field": (lambda m: m["params"]["ddconfig"].update(give_pre_end=True), "unknown field 'give_pre_end'"),
    "double z": (lambda m: m["params"]["ddconfig"].update(double_z=True), "double_z is True, expected False"),
    "no double z": (lambda m: m["params"]["ddconfig"].pop("double_z"), "lacks double_z"),
    "grey": (lambda m: m["params"]["ddconfig"].update(in_channels=1), "in_channels is 1, expected 3"),
    "odd width": (lambda m: m["params"]["ddconfig"].update(ch=33), "ch is 33, expected an integer from 32"),
    "no levels": (lambda m: m["params"]["ddconfig"].update(ch_mult=[]), "ch_mult is a list, expected a list of"),
    "fifty levels": (
        lambda m: m["params"]["ddconfig"].update(ch_mult=[1] * 50),
        "ch_mult is a list, expected a list of",
    ),
    "negative": (lambda m: m["params"]["ddconfig"].update(num_res_blocks=-1), "num_res_blocks is -1"),
    "dropout": (lambda m: m["params"]["ddconfig"].update(dropout=1.5), "dropout is 1.5, expected a number"),
    "unequal": (
        lambda m: m.update(target="taming.models.vqgan.GumbelVQ", params={**m["params"], "embed_dim": 4}),
        "must be equal",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_of_the_project_file_is_named(vqgan: tuple[Path, Any], case: str) -> None:
    file = vqgan[0] / "configs" / "model.yaml"
    settings = yaml.safe_load(file.read_text())
    change, text = WRONG[case]
    change(settings["model"])
    file.write_text(yaml.safe_dump(settings))
    message = refused(f"taming:{vqgan[0]}")
    assert message.startswith(f"{file}: ") and text in message


@pytest.mark.parametrize(
    "text",
    ["", "a: [", "- 1", "model: 3", "a: !!int x", "[" * 5000, "\x00", "a: " + "9" * 5000, "x" * 2**17, "{? {} : 1}"],
    ids=range(10),
)
def test_a_file_that_is_not_a_project_file_is_refused(vqgan: tuple[Path, Any], text: str) -> None:
    file = vqgan[0] / "configs" / "model.yaml"
    file.write_text(text)
    assert refused(f"taming:{vqgan[0]}").startswith(f"{file}: ")


def test_an_exponentially_large_yaml_value_is_not_printed(vqgan: tuple[Path, Any]) -> None:
    file = vqgan[0] / "configs" / "model.yaml"
    bomb = "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))
    file.write_text(f"a: &a [1, 1]\n{bomb}\nmodel:\n  target: *z\n")
    assert refused(f"taming:{vqgan[0]}").startswith(f"{file}: model.target is a list")


def test_a_quantizer_that_the_model_cannot_have_is_refused(small: tuple[Path, Any]) -> None:
    for name in ("", "VectorQuantizer3", "os.system"):
        assert "has no quantizer" in refused(f"taming:{small[0]}?quantizer={name}")
    other = "VectorQuantizer" if hasattr(small[1].quantize, "proj") else "GumbelQuantize"
    assert f"has no quantizer '{other}'" in refused(f"taming:{small[0]}?quantizer={other}")


def test_absurd_sizes_are_refused_before_anything_is_allocated(vqgan: tuple[Path, Any]) -> None:
    file = vqgan[0] / "configs" / "model.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["model"]["params"].update(n_embed=2**24, embed_dim=2**16)  # 4 TB of codebook
    settings["model"]["params"]["ddconfig"].update(z_channels=2**16, ch=4096, ch_mult=[64] * 5)
    file.write_text(yaml.safe_dump(settings))
    assert "other shapes" in refused(f"taming:{vqgan[0]}")


# --- the weights

STATE = "encoder.conv_in.weight"
DAMAGE: dict[str, tuple[Change, str]] = {
    "missing": (lambda s: s.pop(STATE), f"it lacks {STATE}"),
    "extra": (lambda s: s.update(extra=torch.zeros(1)), "it holds unknown extra"),
    "an average": (lambda s: s.update({"model_ema.decay": torch.zeros(1)}), "it holds unknown model_ema.decay"),
    "like the loss": (lambda s: s.update(lossy=torch.zeros(1)), "it holds unknown lossy"),
    "another shape": (
        lambda s: s.update({STATE: s[STATE][:8]}),
        f"{STATE} (8, 3, 3, 3) instead of (32,",
    ),
    "many": (lambda s: [s.pop(k) for k in list(s) if k.startswith("decoder.mid")], " and "),
    "integers": (lambda s: s.update({STATE: s[STATE].long()}), f"'{STATE}' is not a dense"),
    "a number": (lambda s: s.update({STATE: 1.5}), f"'{STATE}' is not a dense"),
    "sparse": (lambda s: s.update({STATE: s[STATE].to_sparse()}), f"'{STATE}' is not a dense"),
    "not finite": (lambda s: s[STATE].view(-1)[5].fill_(float("nan")), f"{STATE} holds values that are not finite"),
    "a key that is not a string": (lambda s: s.update({5: torch.zeros(1)}), "not a mapping of names to tensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_weights_that_do_not_fit_are_named(vqgan: tuple[Path, Any], case: str) -> None:
    folder, network = vqgan
    checkpoint = lightning_checkpoint(network)
    change, text = DAMAGE[case]
    change(checkpoint["state_dict"])
    file = folder / "checkpoints" / "last.ckpt"
    torch.save(checkpoint, file)
    message = refused(f"taming:{folder}")
    assert message.startswith(str(file)) and text in message


def test_only_weights_of_the_loss_are_left_out(vqgan: tuple[Path, Any]) -> None:
    folder, network = vqgan
    before = load_tokenizer(f"taming:{folder}").fingerprint()
    checkpoint = lightning_checkpoint(network)
    assert any(key.startswith("loss.") for key in checkpoint["state_dict"])
    checkpoint["state_dict"]["colorize"] = torch.randn(3, 3, 1, 1)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    assert load_tokenizer(f"taming:{folder}").fingerprint() == before


def test_a_tensor_of_stride_zero_that_is_larger_than_the_file_is_refused(vqgan: tuple[Path, Any]) -> None:
    folder, network = vqgan
    checkpoint = lightning_checkpoint(network)
    state = {k: torch.zeros(1).expand(v.shape) for k, v in checkpoint["state_dict"].items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "last.ckpt")
    assert "of weights, but has" in refused(f"taming:{folder}")


@pytest.mark.parametrize("data", [b"", b"hello world", b"<html>" * 99, b"PK\x03\x04" * 9], ids=range(4))
@pytest.mark.parametrize("name", ["last.ckpt", "weights.safetensors"])
def test_a_file_without_weights_is_refused(vqgan: tuple[Path, Any], data: bytes, name: str) -> None:
    file = vqgan[0] / "checkpoints" / name
    file.write_bytes(data)
    assert refused(f"taming:{vqgan[0]}").startswith(f"{file}: its weights cannot be read: ")


@pytest.mark.parametrize("checkpoint", [[1], {"model": {}}, {"state_dict": [1]}, {"state_dict": {}}], ids=range(4))
def test_a_checkpoint_without_weights_is_refused(vqgan: tuple[Path, Any], checkpoint: Any) -> None:
    torch.save(checkpoint, vqgan[0] / "checkpoints" / "last.ckpt")
    assert refused(f"taming:{vqgan[0]}").startswith(str(vqgan[0] / "checkpoints" / "last.ckpt"))


def test_every_cut_of_a_checkpoint_is_refused(vqgan: tuple[Path, Any]) -> None:
    file = vqgan[0] / "checkpoints" / "last.ckpt"
    whole = file.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 12, dtype=int):
        file.write_bytes(whole[:length])
        refused(f"taming:{vqgan[0]}")
