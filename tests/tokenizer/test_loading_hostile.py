"""A payload in every file of every kind of tokenizer folder: loading refuses or ignores the payload and never executes it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.helpers.commands import ROOT
from tests.helpers.vqgan_folders import SMALL, TINY, Payload, write
from tokenizer import VQ3D
from tokenizer.taming import TamingTokenizer

PROJECT = SMALL["taming-f2-32"]
PARAMS = PROJECT["model"]["params"]

WATCH = """
import json, os, pickle, sys
import torch, yaml
from tokenizer import convert, load_tokenizer

PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn"}
OUTSIDE = {"socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "pickle.find_class", "code.__new__"}
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}
OWN = (sys.prefix, sys.base_prefix, os.getcwd(), "<frozen", "<string>")
events = None

def audit(event, args):
    if events is None:
        return
    bad = event in PROGRAMS or event in OUTSIDE or (event in CHANGES and action != "convert")
    if event == "open" and action != "convert":
        bad = isinstance(args[1], str) and bool(set(args[1]) & set("wax+"))
    if event == "exec":
        bad = not str(args[0].co_filename).startswith(OWN[:4])
    if bad:
        events.append(f"{event} {args!r:.150}")

ACTIONS = {
    "load": load_tokenizer,
    "trust": lambda source: load_tokenizer(source, trust=True),
    "convert": lambda file: convert.main([file]),
    "careless pickle": lambda file: pickle.load(open(file, "rb")),
    "careless torch": lambda file: torch.load(file, weights_only=False),
    "careless yaml": lambda file: yaml.unsafe_load(open(file)),
    "careless program": torch.jit.load,
}
sys.addaudithook(audit)
outcomes = {}
for name, action, source in json.load(sys.stdin):
    events = []
    try:
        ACTIONS[action](source)
        error = None
    except (Exception, SystemExit) as raised:
        error = f"{type(raised).__name__}: {raised}"
    outcomes[name] = [error, events]
    events = None
print(json.dumps(outcomes))
"""


class Program(nn.Module):
    """TorchScript that writes a file when it is loaded, and another when it runs."""

    def __init__(self, canary: str) -> None:
        super().__init__()
        self.canary = canary

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.canary, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.canary = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), state[0])

    def forward(self, video: Tensor) -> Tensor:
        torch.save(video, self.canary)
        return video


class Forger:
    """Valid folders of each kind. Tests replace single files in copies of the folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.own, self.taming, self.pair = root / "own", root / "taming", root / "pair"
        VQ3D(width=8, depth=1).save_pretrained(self.own)
        network = TamingTokenizer(quantizer="VectorQuantizer2", n_embed=32, embed_dim=8, ddconfig=TINY)
        self.checkpoint = {"state_dict": network.state_dict(), "epoch": 1}
        write(self.taming, PROJECT, self.checkpoint)
        self.pair.mkdir()
        config = {"stride": [1, 1, 1], "vocab_size": 2, "levels": None, "causal": True}
        (self.pair / "config.json").write_text(json.dumps(config))
        for name in ("encoder", "decoder"):
            torch.jit.script(nn.Identity()).save(self.pair / f"{name}.jit")

    def canary(self, name: str) -> Path:
        return self.root / "canaries" / name.replace(" ", "-")

    def copy(self, folder: Path, name: str) -> Path:
        return shutil.copytree(folder, self.root / "forged" / name.replace(" ", "-"))


Forge = Callable[[Forger, Path, Payload], Any]


def plain(file: str) -> Forge:
    return lambda forger, folder, payload: (folder / file).write_bytes(pickle.dumps({"state_dict": payload}))


def saved(file: str, **how: Any) -> Forge:
    return lambda forger, folder, payload: torch.save({**forger.checkpoint, "callbacks": payload}, folder / file, **how)


def program(file: str) -> Forge:
    def forge(forger: Forger, folder: Path, payload: Payload) -> None:
        exported = torch.jit.script(Program(str(payload.canary)))
        torch.jit.save(exported, folder / file)

    return forge


def text(file: str, written: str) -> Forge:
    """Replace a file by a text, with the path of the canary for CANARY."""
    return lambda forger, folder, payload: (folder / file).write_text(written.replace("CANARY", str(payload.canary)))


def project(**model: Any) -> Forge:
    def forge(forger: Forger, folder: Path, payload: Payload) -> None:
        changes = json.loads(json.dumps(model).replace("CANARY", str(payload.canary)))
        (folder / "configs" / "model.yaml").write_text(yaml.safe_dump({"model": {**PROJECT["model"], **changes}}))
        np.save(folder / "used.npy", np.array([payload], dtype=object), allow_pickle=True)

    return forge


def _pickle_in_a_program(forger: Forger, folder: Path, payload: Payload) -> None:
    """Replace the encoder by a TorchScript archive whose pickle calls a Python function."""
    with zipfile.ZipFile(folder / "encoder.jit") as good, zipfile.ZipFile(folder / "new", "w") as bad:
        for entry in good.infolist():
            data = pickle.dumps(payload, 2) if entry.filename.endswith("data.pkl") else good.read(entry)
            bad.writestr(entry, data)
    os.replace(folder / "new", folder / "encoder.jit")


def _only_a_pickle(forger: Forger, folder: Path, payload: Payload) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"payload": payload}, folder / "pytorch_model.bin")


CKPT, YAML = "checkpoints/last.ckpt", "configs/model.yaml"
CALL = {"target": "os.system", "params": {"command": "touch CANARY"}}
LOADED = ""
OLD_FORMAT = {"_use_new_zipfile_serialization": False}
CASES: dict[str, tuple[str, Forge, str]] = {
    "own config.json is a pickle": ("own", plain("config.json"), "does not load"),
    "own config.json is a checkpoint": ("own", saved("config.json"), "does not load"),
    "own config.json names a class": (
        "own",
        text("config.json", json.dumps({"name": "os.system", "options": CALL})),
        "does not load",
    ),
    "own model.safetensors is a pickle": ("own", plain("model.safetensors"), "does not load"),
    "own model.safetensors is a checkpoint": ("own", saved("model.safetensors"), "does not load"),
    "own weights are a pickle": ("own", _only_a_pickle, "does not load"),
    "own pickle beside the weights": ("own", saved("pytorch_model.bin"), LOADED),
    "own README": ("own", text("README.md", "---\n!!python/object/apply:os.system ['touch CANARY']\n---\n"), LOADED),
    "taming ckpt holds a call": ("taming", saved(CKPT), "holds more than weights (posix.system)"),
    "taming ckpt holds a call in protocol 4": ("taming", saved(CKPT, pickle_protocol=4), "(Unsupported operand"),
    "taming ckpt of old torch": ("taming", saved(CKPT, **OLD_FORMAT), "cannot be read"),
    "taming ckpt is a pickle": ("taming", plain(CKPT), "cannot be read"),
    "taming ckpt is a program": ("taming", program(CKPT), "cannot be read"),
    "taming safetensors is a checkpoint": ("taming", saved("weights.safetensors"), "cannot be read"),
    "taming safetensors is a pickle": ("taming", plain("checkpoints/weights.safetensors"), "cannot be read"),
    "taming yaml calls": (
        "taming",
        text(YAML, "model: !!python/object/apply:os.system ['touch CANARY']"),
        "not a YAML",
    ),
    "taming yaml makes": ("taming", text(YAML, "!!python/object/new:os.system ['touch CANARY']"), "not a YAML"),
    "taming yaml names": ("taming", text(YAML, "model: {target: !!python/name:os.system }"), "not a YAML"),
    "taming yaml is a pickle": ("taming", plain(YAML), "not a YAML"),
    "taming model is a call": ("taming", project(**CALL), "model.target is 'os.system'"),
    "taming loss is a call": ("taming", project(params={**PARAMS, "lossconfig": CALL}), LOADED),
    "taming ckpt_path is a pickle": ("taming", project(params={**PARAMS, "ckpt_path": "used.npy"}), LOADED),
    "taming remap is a pickle": ("taming", project(params={**PARAMS, "remap": "used.npy"}), "remap is 'used.npy'"),
    "pair encoder is a program": (
        "pair",
        program("encoder.jit"),
        "contains code that runs when it is loaded; pass --trust",
    ),
    "pair decoder is a program": (
        "pair",
        program("decoder.jit"),
        "contains code that runs when it is loaded; pass --trust",
    ),
    "pair encoder is a pickle": ("pair", plain("encoder.jit"), "pass --trust"),
    "pair encoder is a checkpoint": ("pair", saved("encoder.jit"), "pass --trust"),
    "pair config is a pickle": ("pair", plain("config.json"), "pass --trust"),
    "trusted pair config is a pickle": ("trust", plain("config.json"), "config.json: "),
    "trusted pair encoder is a pickle": ("trust", plain("encoder.jit"), "does not load as TorchScript"),
    "trusted pair encoder is a checkpoint": ("trust", saved("encoder.jit"), "does not load as TorchScript"),
    "trusted pair encoder holds a call": ("trust", _pickle_in_a_program, "does not load as TorchScript"),
    "convert a call": ("convert", saved(CKPT), LOADED),
    "convert a call in protocol 4": ("convert", saved(CKPT, pickle_protocol=4), LOADED),
    "convert a checkpoint of old torch": ("convert", saved(CKPT, **OLD_FORMAT), "SystemExit: 2"),
    "convert a pickle": ("convert", plain(CKPT), "SystemExit: 2"),
    "convert a program": ("convert", program(CKPT), "SystemExit: 2"),
}
CARELESS: dict[str, tuple[str, Forge, str]] = {
    "careless pickle": ("careless pickle", plain("x"), "x"),
    "careless torch": ("careless torch", saved("x"), "x"),
    "careless torch and a program": ("careless torch", program("x"), "x"),
    "careless yaml": ("careless yaml", text("x", "!!python/object/apply:os.system ['touch CANARY']"), "x"),
    "careless program": ("careless program", program("x"), "x"),
}


@pytest.fixture(scope="module")
def forger(tmp_path_factory: pytest.TempPathFactory) -> Forger:
    forger = Forger(tmp_path_factory.mktemp("hostile"))
    (forger.root / "canaries").mkdir()
    return forger


@pytest.fixture(scope="module")
def outcomes(forger: Forger) -> dict[str, tuple[str | None, list[str]]]:
    """Error and audit events of each case, in one process that first loads the valid folders."""
    good = [["good own", "load", str(forger.own)], ["good taming", "load", f"taming:{forger.taming}"]]
    jobs = [*good, ["good pair", "trust", f"torchscript:{forger.pair}"]]
    prefix = {"own": "", "taming": "taming:", "pair": "torchscript:", "trust": "torchscript:", "convert": ""}
    for name, (kind, forge, _) in CASES.items():
        base = {"own": forger.own, "pair": forger.pair, "trust": forger.pair}.get(kind, forger.taming)
        folder = forger.copy(base, name)
        forge(forger, folder, Payload(forger.canary(name)))
        action = kind if kind in ("trust", "convert") else "load"
        jobs.append([name, action, f"{prefix[kind]}{folder / CKPT if kind == 'convert' else folder}"])
    for name, (action, forge, file) in CARELESS.items():
        folder = forger.copy(forger.pair, name)
        forge(forger, folder, Payload(forger.canary(name)))
        jobs.append([name, action, str(folder / file)])
    # Exporting the programs creates canaries too.
    for canary in (forger.root / "canaries").iterdir():
        canary.unlink()
    command = [sys.executable, "-c", WATCH]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    watched = subprocess.run(
        command, cwd=ROOT, env=environment, input=json.dumps(jobs), capture_output=True, text=True, timeout=120
    )
    assert watched.returncode == 0, watched.stderr
    return json.loads(watched.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_payload_is_not_executed(
    forger: Forger, outcomes: dict[str, tuple[str | None, list[str]]], case: str
) -> None:
    error, events = outcomes[case]
    assert not forger.canary(case).exists()
    assert events == []
    reason = CASES[case][2]
    assert (error is None) == (reason == LOADED), error
    if error is not None:
        assert reason in error and "\n" not in error
        assert error.startswith(("ValueError: ", "SystemExit: 2"))


@pytest.mark.parametrize("kind", ["own", "taming", "pair"])
def test_valid_folders_load(outcomes: dict[str, tuple[str | None, list[str]]], kind: str) -> None:
    """Control of the test above."""
    error, _ = outcomes[f"good {kind}"]
    assert error is None or (kind == "pair" and "returns torch.float32" in error)


@pytest.mark.parametrize("case", CARELESS)
def test_careless_loading_executes_the_payloads(
    forger: Forger, outcomes: dict[str, tuple[str | None, list[str]]], case: str
) -> None:
    _, events = outcomes[case]
    """Control: the payloads work, and the audit hook reports them. TorchScript runs outside Python, without audit events."""
    assert forger.canary(case).exists()
    if "program" not in case:
        assert any(event.startswith("os.system") for event in events)
