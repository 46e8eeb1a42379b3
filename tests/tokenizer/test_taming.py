"""VQGANs of taming-transformers: the same codes and pixels as the package, from its own files, or one line why not."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from einops import rearrange
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from data.cache import TokenCache
from tests.pipelines.conftest import ROOT, TINY_MODEL, last_line, start
from tokenizer import VQ3D, load_tokenizer
from tokenizer.base import to_float, to_uint8
from tokenizer.taming import load_taming

LOSS = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"disc_start": 0}}
F16 = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
F8 = {**F16, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}
TINY = {
    **F16,
    "z_channels": 8,
    "resolution": 16,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
}


def project(target: str, ddconfig: dict[str, Any], **params: Any) -> dict[str, Any]:
    """A project YAML as it is published."""
    model = {
        "base_learning_rate": 4.5e-06,
        "target": f"taming.models.vqgan.{target}",
        "params": {"ddconfig": ddconfig, "lossconfig": LOSS, **params},
    }
    return {"model": model, "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 12}}}


GUMBEL = {
    "kl_weight": 1e-8,
    "monitor": "val/rec_loss",
    "temperature_scheduler_config": {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 0, "max_decay_steps": 1000001, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 1.0e-06},
    },
}
PUBLISHED = {
    "taming-f16-1024": project("VQModel", F16, embed_dim=256, n_embed=1024),
    "taming-f16-16384": project("VQModel", F16, embed_dim=256, n_embed=16384, monitor="val/rec_loss"),
    "taming-gumbel-f8-8192": project("GumbelVQ", F8, embed_dim=256, n_embed=8192, **GUMBEL),
}
SMALL = {
    "taming-f2-32": project("VQModel", TINY, embed_dim=8, n_embed=32),
    "taming-gumbel-f2-32": project("GumbelVQ", TINY, embed_dim=8, n_embed=32, **GUMBEL),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two that share busy cores wait for each other far longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Loss(nn.Module):
    """Where the package has LPIPS and a discriminator, which no tokenizer needs."""

    def __init__(self) -> None:
        super().__init__()
        self.perceptual_loss, self.discriminator = nn.Linear(2, 2), nn.Conv2d(3, 2, 1)


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """`taming.models.vqgan` itself; only pytorch-lightning and what builds the loss are replaced."""
    lightning, main = ModuleType("pytorch_lightning"), ModuleType("taming.main")
    lightning.LightningModule = nn.Module  # type: ignore[attr-defined]
    main.instantiate_from_config = lambda config: Loss() if config is LOSS else lambda step: 1.0  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", lightning)
        patch.setitem(sys.modules, "taming.main", main)
        from taming.models import vqgan

        yield vqgan
    del sys.modules["taming.models.vqgan"], sys.modules["taming.models"]


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """Windows that move over two photographs: (2, 2, 64, 96, 3)."""
    clips = [[image[150 + t : 214 + t, 200 + t : 296 + t] for t in (0, 5)] for image in load_sample_images().images]
    return torch.from_numpy(np.array(clips))


@pytest.fixture(scope="session")
def details(photographs: Tensor) -> Tensor:
    """Enough for small networks: (2, 2, 16, 24, 3)."""
    return photographs[:, :, :16, :24]


@pytest.fixture
def real_clips() -> Tensor:
    """Frames of real videos, in folders that ARVIDEO_TEST_CLIPS names: (4, 2, 64, 96, 3)."""
    if "ARVIDEO_TEST_CLIPS" not in os.environ:
        pytest.skip("ARVIDEO_TEST_CLIPS names no folder of videos")
    files = sorted(
        path for path in Path(os.environ["ARVIDEO_TEST_CLIPS"]).rglob("*") if path.suffix in (".mp4", ".avi")
    )
    return torch.stack([_first_frames(file) for file in files[:: len(files) // 4][:4]])


def _first_frames(file: Path) -> Tensor:
    with av.open(str(file)) as container:
        frames = [
            frame.to_ndarray(width=96, height=64, format="rgb24") for frame in islice(container.decode(video=0), 2)
        ]
    return torch.from_numpy(np.stack(frames))


def build(package: ModuleType, published: dict[str, Any], pixels_BTHWC: Tensor, seed: int = 0) -> Any:
    """A model of the package with seeded random weights, its codebook spread over what it sees, so that codes differ."""
    torch.manual_seed(seed)
    model = published["model"]
    network = getattr(package, model["target"].rpartition(".")[2])(**model["params"]).eval()
    z_NDhw = network.quant_conv(network.encoder(frames_of(pixels_BTHWC)[:2]))
    mean, deviation = z_NDhw.mean((0, 2, 3)), z_NDhw.std((0, 2, 3))
    if "Gumbel" in model["target"]:
        weight = torch.randn_like(network.quantize.proj.weight[..., 0, 0]) / deviation
        network.quantize.proj.weight.data[..., 0, 0], network.quantize.proj.bias.data = weight, -weight @ mean
    else:
        network.quantize.embedding.weight.data = mean + deviation * torch.randn_like(network.quantize.embedding.weight)
    return network


def frames_of(pixels_BTHWC: Tensor) -> Tensor:
    return rearrange(to_float(pixels_BTHWC), "b t h w c -> (b t) c h w").contiguous()


def lightning_checkpoint(network: nn.Module) -> dict[str, Any]:
    """What Lightning writes; today's versions name the callbacks, old ones have their classes as keys."""
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "last.ckpt"}},
        "optimizer_states": [{"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 4.5e-6}]}],
        "lr_schedulers": [],
        "state_dict": network.state_dict(),
    }


def write(folder: Path, published: dict[str, Any], checkpoint: Any) -> Path:
    """The layout of a download: configs/model.yaml and checkpoints/last.ckpt."""
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "configs" / "model.yaml").write_text(yaml.safe_dump(published))
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@torch.no_grad()
def expected(network: Any, pixels_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, h, w) and what they decode to (N, C, H, W), as the package's second stage has them.

    Its training takes z + (codebook vector - z) instead, the vector but for rounding, which shows as 1e-5 in pixels.
    """
    codes, videos = [], []
    for frame_1CHW in frames_of(pixels_BTHWC).split(1):
        z_1Dhw = network.quant_conv(network.encoder(frame_1CHW))
        _, depth, h, w = z_1Dhw.shape
        if hasattr(network, "temperature_scheduler"):
            codes.append(network.quantize(z_1Dhw, return_logits=True)[3].argmax(1))
        else:
            _, _, (_, _, indices) = network.encode(frame_1CHW)
            codes.append(indices.view(1, h, w))
        quantized_1Dhw = network.quantize.get_codebook_entry(codes[-1].flatten(), (1, h, w, depth))
        videos.append(network.decode(quantized_1Dhw))
    return torch.cat(codes), torch.cat(videos)


def same_as_the_package(tokenizer: Any, network: Any, pixels_BTHWC: Tensor) -> Tensor:
    """Asserts it, and returns the codes."""
    codes_Nhw, videos_NCHW = expected(network, pixels_BTHWC)
    codes_Bthw = tokenizer.encode(pixels_BTHWC)
    assert torch.equal(codes_Bthw.flatten(0, 1), codes_Nhw)
    decoded: list[Tensor] = []
    hook = tokenizer.decoder.register_forward_hook(lambda module, given, made: decoded.append(made))
    pixels = tokenizer.decode(codes_Bthw)
    hook.remove()
    assert (torch.cat(decoded) - videos_NCHW).abs().max() <= 1e-5
    assert pixels.dtype == torch.uint8 and pixels.shape == pixels_BTHWC.shape
    rounded_NHWC = to_uint8(rearrange(videos_NCHW, "n c h w -> n h w c"))
    assert torch.equal(pixels.flatten(0, 1), rounded_NHWC)
    return codes_Bthw


# --- parity with the package


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_gives_the_codes_and_pixels_of_the_package(
    package: ModuleType, photographs: Tensor, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build(package, PUBLISHED[name], photographs)
    folder = write(tmp_path / "vqgan", PUBLISHED[name], lightning_checkpoint(network))
    capsys.readouterr()
    tokenizer = load_tokenizer(f"taming:{folder}")
    shutil.rmtree(folder)
    assert capsys.readouterr().out == ""
    assert tokenizer.name == name
    codes_Bthw = same_as_the_package(tokenizer, network, photographs[:, :1])
    assert codes_Bthw.shape == (2, *tokenizer.codes_shape(1, 64, 96))
    assert len(codes_Bthw.unique()) > codes_Bthw.numel() / 4  # or else equal codes would mean little


@pytest.mark.soak
@pytest.mark.parametrize("name", PUBLISHED)
def test_parity_holds_on_real_videos(package: ModuleType, real_clips: Tensor, tmp_path: Path, name: str) -> None:
    network = build(package, PUBLISHED[name], real_clips)
    folder = write(tmp_path / "vqgan", PUBLISHED[name], lightning_checkpoint(network))
    tokenizer = load_tokenizer(f"taming:{folder}")
    shutil.rmtree(folder)
    same_as_the_package(tokenizer, network, real_clips)


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest, package: ModuleType, details: Tensor, tmp_path: Path) -> tuple[Path, Any]:
    """A folder, and the model of the package that is in it."""
    network = build(package, SMALL[request.param], details)
    return write(tmp_path / "small", SMALL[request.param], lightning_checkpoint(network)), network


@pytest.fixture
def vqgan(package: ModuleType, details: Tensor, tmp_path: Path) -> tuple[Path, Any]:
    network = build(package, SMALL["taming-f2-32"], details)
    return write(tmp_path / "vqgan", SMALL["taming-f2-32"], lightning_checkpoint(network)), network


def test_the_old_quantizer_is_had_by_its_name(vqgan: tuple[Path, Any], details: Tensor) -> None:
    from taming.modules.vqvae.quantize import VectorQuantizer

    folder, network = vqgan
    today = load_tokenizer(f"taming:{folder}")
    old = load_tokenizer(f"taming:{folder}?quantizer=VectorQuantizer")
    assert isinstance(old.quantize, VectorQuantizer)
    same_as_the_package(today, network, details)
    before = network.quantize
    network.quantize = VectorQuantizer(before.n_e, before.e_dim, beta=0.25)
    network.quantize.load_state_dict(before.state_dict())
    same_as_the_package(old, network, details)
    assert old.fingerprint() != today.fingerprint()
    assert load_tokenizer(f"taming:{folder}?quantizer=VectorQuantizer2").fingerprint() == today.fingerprint()


def test_an_equal_distance_is_decided_as_the_package_decides_it(vqgan: tuple[Path, Any], details: Tensor) -> None:
    folder, network = vqgan
    network.quantize.embedding.weight.data[7:] = network.quantize.embedding.weight.data[3]
    torch.save(lightning_checkpoint(network), folder / "checkpoints" / "last.ckpt")
    for source in (f"taming:{folder}", f"taming:{folder}?quantizer=VectorQuantizer"):
        codes = load_tokenizer(source).encode(details)
        assert (codes == 3).any() and codes.max() < 7


# --- what every tokenizer is


def test_codes_of_a_frame_depend_on_nothing_else(small: tuple[Path, Any], details: Tensor) -> None:
    tokenizer = load_tokenizer(f"taming:{small[0]}")
    codes_Bthw = tokenizer.encode(details)
    assert codes_Bthw.dtype == torch.int64
    for b in range(2):
        for t in range(2):
            alone = details[b : b + 1, t : t + 1]
            assert torch.equal(tokenizer.encode(alone)[0, 0], codes_Bthw[b, t])
            assert torch.equal(
                tokenizer.decode(codes_Bthw[b : b + 1, t : t + 1]), tokenizer.decode(codes_Bthw)[b, t][None, None]
            )
    assert torch.equal(tokenizer.encode(details), codes_Bthw)  # Gumbel: no noise
    assert torch.equal(tokenizer.encode(details.repeat(1, 20, 1, 1, 1)), codes_Bthw.repeat(1, 20, 1, 1))
    assert tokenizer.encode(details[:0]).shape == (0, *codes_Bthw.shape[1:])


def test_it_says_what_its_codes_are(small: tuple[Path, Any]) -> None:
    folder, network = small
    tokenizer = load_tokenizer(f"taming:{folder}")
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.levels) == (32, (1, 2, 2), None)
    assert (tokenizer.causal, tokenizer.context) == (False, (0, 0))
    codebook = tokenizer.codebook()
    vectors = network.quantize.embed if hasattr(network.quantize, "embed") else network.quantize.embedding
    assert codebook is not None and torch.equal(codebook, vectors.weight)


def test_it_is_never_trained(vqgan: tuple[Path, Any]) -> None:
    tokenizer = load_taming(vqgan[0])
    nn.Sequential(tokenizer).train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_the_fingerprint_is_of_weights_quantizer_and_configuration(small: tuple[Path, Any]) -> None:
    folder, network = small
    first = load_tokenizer(f"taming:{folder}").fingerprint()
    project_file = folder / "configs" / "model.yaml"
    settings = yaml.safe_load(project_file.read_text())
    settings["model"]["params"]["ddconfig"]["attn_resolutions"] = [8, 4]  # the same weights
    project_file.write_text(yaml.safe_dump(settings))
    second = load_tokenizer(f"taming:{folder}").fingerprint()
    network.decoder.conv_out.bias.data[0] += 1
    torch.save(lightning_checkpoint(network), folder / "checkpoints" / "last.ckpt")
    third = load_tokenizer(f"taming:{folder}").fingerprint()
    assert len({first, second, third}) == 3
    assert third == load_tokenizer(f"taming:{folder}").fingerprint()


def test_bf16_leaves_the_quantizer_in_fp32(vqgan: tuple[Path, Any], details: Tensor) -> None:
    tokenizer: Any = load_tokenizer(f"taming:{vqgan[0]}")
    seen: list[torch.dtype] = []
    tokenizer.quantize.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    tokenizer.encoder.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer.encode(details[:1, :1])
    assert seen == [torch.bfloat16, torch.float32]


def test_the_pipelines_take_it_as_it_is(vqgan: tuple[Path, Any], video_folder: Path, tmp_path: Path) -> None:
    """Two codes, of two frames, are one token."""
    flags = ["--videos", str(video_folder), "--clip.frames", "4", "--clip.size", "16"]
    tokenized = last_line(start(tmp_path, "tokenize", *flags, "--tokenizer", f"taming:{vqgan[0]}"))
    cache = TokenCache.open(tmp_path / tokenized["cache"])
    assert (cache.codes_shape, cache.vocab_size, cache.levels) == ((4, 8, 8), 32, None)
    assert np.array_equal(cache.codebook(), vqgan[1].quantize.embedding.weight.detach())
    trained = last_line(start(tmp_path, "pretrain_ar", *TINY_MODEL, "--objective.code_patch", "[2,1,1]"))
    assert trained["cache"] == tokenized["cache"] and trained["bits_per_code"] > 0


# --- the folder


def test_a_flat_folder_of_a_training_run_will_do(vqgan: tuple[Path, Any], details: Tensor, tmp_path: Path) -> None:
    folder, network = vqgan
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(folder / "configs" / "model.yaml", flat / "2020-11-09T13-31-51-project.yaml")
    (flat / "2020-11-09T13-31-51-lightning.yaml").write_text("lightning: {}")
    shutil.copy(folder / "checkpoints" / "last.ckpt", flat / "epoch=3.ckpt")
    tokenizer = load_tokenizer(f"taming:{flat}")
    assert tokenizer.fingerprint() == load_tokenizer(f"taming:{folder}").fingerprint()
    (flat / "epoch=2.ckpt").write_bytes(b"an older one")
    with pytest.raises(ValueError, match=r"which .ckpt is meant\? There are epoch=2.ckpt, epoch=3.ckpt"):
        load_tokenizer(f"taming:{flat}")
    shutil.copy(flat / "epoch=3.ckpt", flat / "last.ckpt")
    assert load_tokenizer(f"taming:{flat}").fingerprint() == tokenizer.fingerprint()
    shutil.copy(folder / "configs" / "model.yaml", flat / "another-project.yaml")
    with pytest.raises(ValueError, match="which project .yaml is meant"):
        load_tokenizer(f"taming:{flat}")


def test_converted_weights_come_before_the_checkpoint(vqgan: tuple[Path, Any]) -> None:
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


def refused(source: str) -> str:
    """The one line that it is refused with."""
    with pytest.raises(ValueError) as error:
        load_tokenizer(source)
    message = str(error.value)
    assert "\n" not in message and len(message) < 800
    return message


def test_a_folder_without_a_part_says_which(vqgan: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = vqgan
    assert "no such folder" in refused(f"taming:{tmp_path / 'none'}")
    assert "no such folder" in refused(f"taming:{folder / 'configs' / 'model.yaml'}")
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert refused(f"taming:{folder}") == f"{folder}: no .ckpt in it"
    os.mkfifo(folder / "checkpoints" / "last.ckpt")
    assert refused(f"taming:{folder}") == f"{folder}: no .ckpt in it"
    (folder / "configs" / "model.yaml").unlink()
    assert refused(f"taming:{folder}") == f"{folder}: no project .yaml in it"


def test_a_missing_package_is_said_with_its_remedy(vqgan: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "taming.modules.vqvae", None)
    assert refused(f"taming:{vqgan[0]}").endswith("pip install --no-deps taming-transformers-rom1504")


def test_neither_lightning_nor_the_packages_models_are_imported(vqgan: tuple[Path, Any]) -> None:
    code = (
        "import sys; from tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])\n"
        "assert 'taming.modules.vqvae.quantize' in sys.modules\n"
        "assert not {'taming.models', 'taming.main', 'taming.modules.losses', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, f"taming:{vqgan[0]}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["taming", "torchscript", "vqvae:x"])
def test_a_folder_of_our_own_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    own = VQ3D(width=8, depth=1)
    own.save_pretrained(name)
    assert load_tokenizer(name).fingerprint() == own.fingerprint()


@pytest.mark.parametrize("source", ["vqvae:folder", "hf:someone/tokenizer", "http://host/x", ":x"])
def test_an_unknown_kind_of_tokenizer_is_refused_with_those_there_are(source: str) -> None:
    assert "taming:FOLDER, torchscript:FOLDER" in refused(source)


# --- what the project file may say

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
    "no vocabulary": (lambda m: m["params"].pop("n_embed"), "model.params lacks n_embed, a whole number"),
    "a text": (lambda m: m["params"].update(n_embed="32"), "n_embed is '32', expected a whole number"),
    "true": (lambda m: m["params"].update(embed_dim=True), "embed_dim is True, expected a whole number"),
    "a huge vocabulary": (lambda m: m["params"].update(n_embed=10**200), "n_embed is a int, expected a whole number"),
    "an unknown field": (lambda m: m["params"]["ddconfig"].update(give_pre_end=True), "unknown field 'give_pre_end'"),
    "double z": (lambda m: m["params"]["ddconfig"].update(double_z=True), "double_z is True, expected False"),
    "no double z": (lambda m: m["params"]["ddconfig"].pop("double_z"), "lacks double_z"),
    "grey": (lambda m: m["params"]["ddconfig"].update(in_channels=1), "in_channels is 1, expected 3"),
    "odd width": (lambda m: m["params"]["ddconfig"].update(ch=33), "ch is 33, expected a whole number from 32"),
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
def test_a_project_file_that_is_wrong_is_refused_by_name(vqgan: tuple[Path, Any], case: str) -> None:
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
def test_a_project_file_that_is_no_such_thing_is_refused(vqgan: tuple[Path, Any], text: str) -> None:
    file = vqgan[0] / "configs" / "model.yaml"
    file.write_text(text)
    assert refused(f"taming:{vqgan[0]}").startswith(f"{file}: ")


def test_what_a_project_file_repeats_without_end_is_not_printed(vqgan: tuple[Path, Any]) -> None:
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
    assert "has in another shape" in refused(f"taming:{vqgan[0]}")


# --- what the weights may be

STATE = "encoder.conv_in.weight"
DAMAGE: dict[str, tuple[Change, str]] = {
    "missing": (lambda s: s.pop(STATE), f"it lacks {STATE}"),
    "extra": (lambda s: s.update(extra=torch.zeros(1)), "it holds unknown extra"),
    "an average": (lambda s: s.update({"model_ema.decay": torch.zeros(1)}), "it holds unknown model_ema.decay"),
    "like the loss": (lambda s: s.update(lossy=torch.zeros(1)), "it holds unknown lossy"),
    "another shape": (
        lambda s: s.update({STATE: s[STATE][:8]}),
        f"in another shape {STATE} (8, 3, 3, 3) instead of (32,",
    ),
    "many": (lambda s: [s.pop(k) for k in list(s) if k.startswith("decoder.mid")], " and "),
    "whole numbers": (lambda s: s.update({STATE: s[STATE].long()}), f"'{STATE}' is no tensor of numbers"),
    "a number": (lambda s: s.update({STATE: 1.5}), f"'{STATE}' is no tensor of numbers"),
    "sparse": (lambda s: s.update({STATE: s[STATE].to_sparse()}), f"'{STATE}' is no tensor of numbers"),
    "not finite": (lambda s: s[STATE].view(-1)[5].fill_(float("nan")), f"{STATE} holds values that are not finite"),
    "a key that is no text": (lambda s: s.update({5: torch.zeros(1)}), "not one of tensors by name"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_weights_that_do_not_fit_are_refused_by_name(vqgan: tuple[Path, Any], case: str) -> None:
    folder, network = vqgan
    checkpoint = lightning_checkpoint(network)
    change, text = DAMAGE[case]
    change(checkpoint["state_dict"])
    file = folder / "checkpoints" / "last.ckpt"
    torch.save(checkpoint, file)
    message = refused(f"taming:{folder}")
    assert message.startswith(str(file)) and text in message


def test_only_what_is_of_the_loss_is_left_out(vqgan: tuple[Path, Any]) -> None:
    folder, network = vqgan
    before = load_tokenizer(f"taming:{folder}").fingerprint()
    checkpoint = lightning_checkpoint(network)
    assert any(key.startswith("loss.") for key in checkpoint["state_dict"])
    checkpoint["state_dict"]["colorize"] = torch.randn(3, 3, 1, 1)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    assert load_tokenizer(f"taming:{folder}").fingerprint() == before


def test_one_number_that_fills_a_whole_tensor_is_refused(vqgan: tuple[Path, Any]) -> None:
    folder, network = vqgan
    checkpoint = lightning_checkpoint(network)
    state = {k: torch.zeros(1).expand(v.shape) for k, v in checkpoint["state_dict"].items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "last.ckpt")
    assert "of weights, but has" in refused(f"taming:{folder}")


@pytest.mark.parametrize("data", [b"", b"hello world", b"<html>" * 99, b"PK\x03\x04" * 9], ids=range(4))
@pytest.mark.parametrize("name", ["last.ckpt", "weights.safetensors"])
def test_a_file_that_holds_no_weights_is_refused(vqgan: tuple[Path, Any], data: bytes, name: str) -> None:
    file = vqgan[0] / "checkpoints" / name
    file.write_bytes(data)
    assert refused(f"taming:{vqgan[0]}").startswith(f"{file}: holds no weights that can be read: ")


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
